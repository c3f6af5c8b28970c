"""k2jax: pretraining of Kimi-K2-class models on JAX. Names are imported when they are first used."""

__all__ = ["load_hf"]


def __getattr__(name: str):
    if name == "load_hf":
        from k2jax.interop.hf import load_hf

        return load_hf
    raise AttributeError(f"module 'k2jax' has no attribute {name!r}")
