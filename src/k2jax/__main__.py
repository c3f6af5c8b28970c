"""`python -m k2jax` is the `k2jax` command."""

from k2jax.launch.cli import entry

entry()
