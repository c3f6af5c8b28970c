"""The whole forward pass in plain NumPy, from the published formulas (DeepSeek-V3 report 2.1), one token at a time.

Written without a look at k2jax.model: loops over tokens, heads and experts, RoPE as a complex rotation. It runs in the
dtype of its parameters; `params` and `router_bias` are the pytrees of k2jax, whose layers are stacked.
"""

import jax
import numpy as np


def rms_norm(x, gain, eps):
    return x / np.sqrt((x**2).mean() + eps) * gain


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def rope_of(config, kind):
    """(frequencies, logit scale): RoPE, or YaRN as k2-facts 3.3 gives it, pair by pair."""
    rope, dim = config.rope, config.qk_rope_head_dim
    scale = (config.qk_nope_head_dim + dim) ** -0.5
    plain = [rope.rope_theta ** (-2 * i / dim) for i in range(dim // 2)]
    if kind == "plain":
        return np.array(plain), scale
    corr = [
        dim * np.log(rope.original_max_position_embeddings / (2 * np.pi * r)) / (2 * np.log(rope.rope_theta))
        for r in (rope.beta_fast, rope.beta_slow)
    ]
    low, high = max(np.floor(corr[0]), 0), min(np.ceil(corr[1]), dim - 1)
    frequencies = []
    for i, f in enumerate(plain):
        ramp = min(max((i - low) / (high - low if high > low else 0.001), 0), 1)
        frequencies.append(f * (1 - ramp) + f / rope.factor * ramp)
    return np.array(frequencies), scale * (0.1 * rope.mscale_all_dim * np.log(rope.factor) + 1) ** 2


def rotate(x, position, frequencies):
    """RoPE: pair i = (x[2i], x[2i + 1]) is a complex number, turned by position * frequency i."""
    return (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies)


def swiglu(x, w):
    return (silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def mla(xs, w, config, positions, segments, rope="plain"):
    """Attention outputs of the tokens `xs` of one sequence, and each head's largest logit."""
    nope, latent = config.qk_nope_head_dim, config.kv_lora_rank
    frequencies, scale = rope_of(config, rope)
    if config.q_lora_rank is None:
        queries = [np.einsum("d,dhk->hk", x, w["q"]) for x in xs]
    else:
        queries = [np.einsum("q,qhk->hk", rms_norm(x @ w["q_a"], w["q_a_norm"], 1e-6), w["q_b"]) for x in xs]
    downs = [x @ w["kv_a"] for x in xs]
    keys_values = [np.einsum("c,chg->hg", rms_norm(d[:latent], w["kv_a_norm"], 1e-6), w["kv_b"]) for d in downs]
    rope_keys = [rotate(d[latent:], p, frequencies) for d, p in zip(downs, positions, strict=True)]
    largest = np.full(config.num_attention_heads, -np.inf)
    outputs = []
    for t, query in enumerate(queries):
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        heads = []
        for h in range(config.num_attention_heads):
            turned = rotate(query[h, nope:], positions[t], frequencies)
            logits = (
                np.array(
                    [
                        # Re(a conj b) is the dot product of a and b as real pairs
                        query[h, :nope] @ keys_values[s][h, :nope] + (turned * rope_keys[s].conj()).real.sum()
                        for s in seen
                    ]
                )
                * scale
            )
            largest[h] = max(largest[h], logits.max())
            probabilities = softmax(logits)
            heads.append(sum(p * keys_values[s][h, nope:] for p, s in zip(probabilities, seen, strict=True)))
        outputs.append(np.einsum("hu,hud->d", np.stack(heads), w["o"]))
    return outputs, largest


def moe(x, w, bias, config, load):
    """Routed and shared experts on one token; counts its choices in `load`."""
    score = 1 / (1 + np.exp(-(x @ w["router"])))
    biased, size = score + bias, len(score) // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    best = sorted(groups, key=lambda g: -np.sort(biased[list(g)])[-2:].sum())[: config.topk_group]
    chosen = sorted((e for g in best for e in g), key=lambda e: -biased[e])[: config.num_experts_per_tok]
    total = sum(score[e] for e in chosen)
    y = swiglu(x, w["shared"]) if "shared" in w else np.zeros_like(x)
    for e in chosen:
        load[e] += 1
        expert = {name: w[name][e] for name in ("gate", "up", "down")}
        y = y + score[e] / total * config.routed_scaling_factor * swiglu(x, expert)
    return y


def layers_of(params, router_bias):
    """(weights, router bias or None) of every layer, in order."""
    for stack in ("dense", "moe"):
        for i in range(len(params[stack]["attention_norm"]) if stack in params else 0):
            bias = router_bias["moe"]["ffn"]["bias"][i] if stack == "moe" else None
            yield jax.tree.map(lambda w, i=i: w[i], params[stack]), bias


def forward(params, router_bias, config, tokens, positions, segments, rope="plain"):
    """logits [B, T, V], largest logits [layers, H], expert loads [MoE layers, E]."""
    xs = [[params["embedding"][token] for token in row] for row in tokens]
    largest, loads = [], []
    for w, bias in layers_of(params, router_bias):
        maxima, load = [], np.zeros(config.n_routed_experts, int)
        for b in range(len(xs)):
            normed = [rms_norm(x, w["attention_norm"], config.rms_norm_eps) for x in xs[b]]
            attended, maximum = mla(normed, w["attention"], config, positions[b], segments[b], rope)
            maxima.append(maximum)
            for t, a in enumerate(attended):
                x = xs[b][t] + a
                z = rms_norm(x, w["ffn_norm"], config.rms_norm_eps)
                xs[b][t] = x + (swiglu(z, w["ffn"]) if bias is None else moe(z, w["ffn"], bias, config, load))
        largest.append(np.max(maxima, 0))
        loads += [load] if bias is not None else []
    logits = [[rms_norm(x, params["norm"], config.rms_norm_eps) @ params["head"] for x in row] for row in xs]
    return np.array(logits), np.array(largest), np.array(loads).reshape(-1, config.n_routed_experts)


def cross_entropy_sum(logits, targets):
    """Sum over all tokens of -log softmax(logits)[target]."""
    return -sum(
        np.log(softmax(row)[target])
        for sequence, wanted in zip(logits, targets, strict=True)
        for row, target in zip(sequence, wanted, strict=True)
    )
