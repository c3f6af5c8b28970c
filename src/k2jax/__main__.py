"""`python -m k2jax` is the `k2jax` command."""

from k2jax.cli.main import entry

entry()
