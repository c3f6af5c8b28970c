"""k2jax: pretraining of Kimi-K2-class models on JAX. Names are imported when they are first used."""

import importlib

_HOMES = {"load_hf": "k2jax.interop.hf", "mesh_of": "k2jax.sharding.mesh"}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'k2jax' has no attribute {name!r}; there are {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
