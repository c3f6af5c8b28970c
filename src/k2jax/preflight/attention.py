"""The start-up check of attention: kernel or chunks, the gathering of latents, and the largest logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import Config
from k2jax.kernels.chunked_attention import TokenIndex
from k2jax.kernels.tokamax_attention import TILE
from k2jax.model.attention import attention, choose_attention
from k2jax.model.mla import keys_and_values
from k2jax.preflight.compare import CheckResult, difference, num_rows, on_one_device
from k2jax.sharding.compile_options import program_options
from k2jax.sharding.place import place, platform, whole

LATENT, CHUNK = 64, 64
DIMS = "BHSK", "BT", "BT", "CHN", "CHN"  # of the arguments: queries, latents, rotary keys, what makes keys and values


def _values(model, mesh: jax.sharding.Mesh):
    """(arguments, places, output gradient), drawn on the host, alike on every process: documents of uneven length."""
    rng = np.random.default_rng(0)
    nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    rows, heads = num_rows(mesh), 2 * mesh.shape["tensor"]
    length = math.lcm(2 * TILE, mesh.shape["context"] * mesh.shape["tensor"])
    shapes = [(rows, heads, length, nope + rope), (rows, length, LATENT), (rows, length, rope)]
    shapes += [(LATENT, heads, nope), (LATENT, heads, value), (rows, heads, length, value)]
    *arguments, dout_BHSU = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    arguments[3:] = [weight / np.float32(math.sqrt(LATENT)) for weight in arguments[3:]]
    index_BS = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return tuple(arguments), TokenIndex(index_BS, np.sort(rng.integers(0, 3, (rows, length), np.int32), 1)), dout_BHSU


def _plain(q_BHSK, latent_BZC, rope_key_BZR, key_CHN, value_CHU, at: TokenIndex, scale: float):
    """Softmax over all pairs, a sequence at a time."""

    @jax.checkpoint
    def sequence(values):
        q_HSK, latent_ZC, rope_key_ZR, index_S, segment_S = values
        k_BHZK, v_BHZU = keys_and_values(latent_ZC[None], rope_key_ZR[None], key_CHN, value_CHU)
        seen_SZ = (segment_S[:, None] == segment_S) & (index_S[:, None] >= index_S)
        logit_HSZ = jnp.where(seen_SZ, jnp.einsum("HSK,HZK->HSZ", q_HSK, k_BHZK[0]) * scale, -jnp.inf)
        return jnp.einsum("HSZ,HZU->HSU", jax.nn.softmax(logit_HSZ), v_BHZU[0]), logit_HSZ.max((1, 2))

    out_BHSU, max_BH = jax.lax.map(sequence, (q_BHSK, latent_BZC, rope_key_BZR, *at))
    return out_BHSU, max_BH.max(0)


def check_attention(config: Config, mesh: jax.sharding.Mesh) -> CheckResult:
    """Attention over packed documents, from queries and latents to outputs and largest logits."""
    arguments, at, dout_BHSU = _values(config.model, mesh)
    dtype, scale = jnp.dtype(config.train.compute_dtype), arguments[0].shape[-1] ** -0.5
    kernels = dataclasses.replace(config.kernels, attention_chunk=CHUNK)

    def layer(at, *arguments):
        q, latent, rope_key, key, value = (place(x, d).astype(dtype) for x, d in zip(arguments, DIMS, strict=True))
        q_at, k_at = (TokenIndex(*(place(x, dims) for x in at)) for dims in ("BS", "BZ"))
        out, max_H = attention(q, (latent, rope_key), (key, value), keys_and_values, q_at, k_at, scale, kernels)
        return out.astype(jnp.float32), max_H

    def chosen_path(at, arguments, dout_BHSU):
        out_BHSU, pull, max_H = jax.vjp(lambda *x: layer(at, *x), *arguments, has_aux=True)
        return jax.tree.map(whole, (out_BHSU, max_H, *pull(place(dout_BHSU, "BHSU"))))

    def plain_path(at, arguments, dout_BHSU):
        arguments = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), arguments)
        out_BHSU, pull, max_H = jax.vjp(lambda *x: _plain(*x, at, scale), *arguments, has_aux=True)
        return out_BHSU, max_H, *pull(dout_BHSU)

    got = jax.device_get(jax.jit(chosen_path, compiler_options=program_options(config.kernels, mesh))(at, arguments, dout_BHSU))
    want = on_one_device(plain_path, at, arguments, dout_BHSU)
    gradients = [
        f"gradient of {name}" for name in ("queries", "latents", "rotary keys", "key weights", "value weights")
    ]
    names = ["attention's output", "largest logits", *gradients]
    chosen = choose_attention(kernels, platform(), at.index.shape[1], mesh.shape["context"])
    remedy = "set kernels.attention = 'chunked'" if chosen == "tokamax" else "try another mesh"
    found = [difference(name, g, w) for name, g, w in zip(names, got, want, strict=True)]
    return CheckResult(f"attention {chosen}", found, remedy)
