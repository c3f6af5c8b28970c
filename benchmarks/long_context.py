"""Memory of one device in one attention layer of Kimi K2, forward and backward, at 128k to 2M tokens; nothing is run.

python benchmarks/long_context.py. One sequence, bfloat16, `context` x `tensor` devices share it: each has its queries of
its heads, and the latents of all tokens. From the compiler's memory analysis on a CPU, which makes some bfloat16 arrays
float32, so it is from above; weights and the layer's other parts are not in it.
"""

import jax
import jax.numpy as jnp

from k2jax.launch.distributed import use_cpu_devices

TENSOR, LENGTHS = 4, ((131_072, 8), (1_048_576, 64), (1_048_576, 256), (2_097_152, 128), (2_097_152, 512))


def main() -> None:
    use_cpu_devices(1)
    from k2jax.config import ModelConfig
    from k2jax.kernels.chunked_attention import TokenIndex, chunked_attention
    from k2jax.model.attention import chunk_tokens
    from k2jax.model.mla import keys_and_values

    config = ModelConfig()
    heads, latent, rope = config.num_attention_heads // TENSOR, config.kv_lora_rank, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    for length, context in LENGTHS:
        here, chunk = length // context, chunk_tokens(length)

        def layer(q, sources, weights, q_at, k_at, chunk=chunk):
            out, _ = chunked_attention(q, sources, weights, keys_and_values, q_at, k_at, 0.1, (chunk, chunk))
            return out.astype(jnp.float32).sum()

        sources = shape(1, length, latent), shape(1, length, rope)
        weights = shape(latent, heads, nope), shape(latent, heads, value)
        places = [TokenIndex(*[shape(1, tokens, dtype=jnp.int32)] * 2) for tokens in (here, length)]
        arguments = shape(1, heads, here, nope + rope), sources, weights, *places
        used = jax.jit(jax.grad(layer, (0, 1, 2))).lower(*arguments).compile().memory_analysis()
        parts = used.temp_size_in_bytes, used.argument_size_in_bytes, used.output_size_in_bytes
        gib = [size / 2**30 for size in (*parts, sum(parts))]
        print(f"{length:>9,} tokens, context {context:>3} x tensor {TENSOR}, chunk {chunk}: temporary {gib[0]:.2f}, "
              f"arguments {gib[1]:.2f}, gradients {gib[2]:.2f}, in all {gib[3]:.2f} GiB")  # fmt: skip


if __name__ == "__main__":
    main()
