"""Devices of this process, chosen before jax first looks for them."""

from k2jax.errors import UserError


def use_cpu_devices(count: int) -> None:
    """Make this process see `count` CPU devices and nothing else; must come before the first use of jax's devices.

    Raises UserError for a count below 1.
    """
    if count < 1:
        raise UserError(f"--simulate {count}: must be at least 1")
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
