"""Causal attention by tokamax's kernels, with each query's largest logit: splash on TPU, Mosaic or Triton on GPU.

All take keys and values whole, and queries of the same tokens in the same order.

    B sequences, H heads, S queries and keys, K query and key dim, U value dim
"""

import jax
import jax.numpy as jnp

from k2jax.errors import UserError
from k2jax.kernels.chunked_attention import ATTENTION_OUT
from k2jax.kernels.tokamax import call_kernel, first_line, load_tokamax

TILE = 128  # sequences are whole tiles
_LARGEST_BLOCK = 1024


def _first_of_segment(segment_BS: jax.Array) -> jax.Array:
    """int32 [B, S]: the first token of the same segment. A segment's tokens stand together."""
    index_S = jnp.arange(segment_BS.shape[1], dtype=jnp.int32)
    begins_BS = jnp.diff(segment_BS, axis=1, prepend=segment_BS[:, :1] - 1) != 0
    return jax.lax.cummax(jnp.where(begins_BS, index_S, 0), axis=1)


def _splash(q_BHSK, k_BHSK, v_BHSU, segment_BS, interpret: bool):
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    length = q_BHSK.shape[2]
    block = next(size for size in (_LARGEST_BLOCK, 512, 256, TILE) if length % size == 0)
    # Its base-2 form multiplies the queries by log2(e) in their dtype, which in bfloat16 is 0.18 % too large.
    config = splash.SplashConfig(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_base2_exp=False,
        residual_checkpoint_name=ATTENTION_OUT, interpret=interpret,
    )  # fmt: skip
    mask = masks.CausalMask((length, length))
    kernel = splash.make_splash_mha(mask, config=config, save_residuals=True, q_seq_shards=1)
    segments = splash.base.SegmentIds(segment_BS, segment_BS)
    out_BHSU, stats = jax.vmap(lambda q, k, v, segment: kernel(q, k, v, segment_ids=segment))(
        q_BHSK, k_BHSK, v_BHSU, segments
    )
    return out_BHSU, stats["max_logits"]


def _gpu(q_BHSK, k_BHSK, v_BHSU, segment_BS):
    from tokamax._src.ops.attention import api, base

    mask = base.Mask(k_start=_first_of_segment(segment_BS)[:, None], is_causal=True)
    inputs, errors = [x.swapaxes(1, 2) for x in (q_BHSK, k_BHSK, v_BHSU)], []
    for name in ("mosaic_gpu", "triton"):  # as tokamax's own entry, which does not give the largest logits, tries them
        try:
            out_BSHU, (max_BHS, _) = api.IMPLEMENTATIONS[name](
                *inputs, mask=mask, logits_scale=1.0, return_residuals=True
            )
            return out_BSHU.swapaxes(1, 2), max_BHS
        except Exception as error:  # not ours: for a jax or a shape that it does not know it may raise anything
            errors.append(f"{name}: {type(error).__name__}: {first_line(error)}")
    rule = f"tokamax has none that works with jax {jax.__version__}, this device and these shapes"
    raise UserError(f"kernels.attention = 'tokamax': {rule} ({'; '.join(errors)}); use 'chunked'")


def library_attention(
    q_BHSK: jax.Array,
    k_BHSK: jax.Array,
    v_BHSU: jax.Array,
    segment_BS: jax.Array,
    scale: float | jax.Array,
    platform: str,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, S, U] in the values' dtype, and each query's largest scaled logit [B, H, S] (signed, no gradient).

    A query sees the tokens of its segment up to itself; a segment's tokens stand together. scale goes into the queries,
    which are rounded to their dtype once more. interpret: the TPU's kernel on any device. UserError without tokamax.
    """
    load_tokamax("attention")
    q_BHSK = (q_BHSK.astype(jnp.float32) * scale).astype(q_BHSK.dtype)

    def kernel(q, k, v, segment):
        if platform == "tpu" or interpret:
            return _splash(q, k, v, segment, interpret)
        return _gpu(q, k, v, segment)

    out_BHSU, max_BHS = call_kernel(kernel, q_BHSK, k_BHSK, v_BHSU, segment_BS)
    return out_BHSU.astype(v_BHSU.dtype), jax.lax.stop_gradient(max_BHS)
