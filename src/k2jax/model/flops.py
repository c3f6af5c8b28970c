"""Parameters and FLOPs, counted from the declarations."""

from collections import Counter

from k2jax.config import ModelConfig
from k2jax.model.weights import Weight


def count_parameters(weights: list[Weight], config: ModelConfig) -> dict[str, tuple[int, int]]:
    """{component: (total, activated per token)}; an embedding row is counted as activated in full, as K2's 32B is.

    The router's balancing bias, which no optimizer sees, is counted with the router, as the published checkpoint does.
    """
    total, activated = Counter(), Counter()
    for weight in weights:
        share = config.num_experts_per_tok / config.n_routed_experts if "E" in weight.stack else 1
        total[weight.component] += weight.size
        activated[weight.component] += round(weight.size * share)
    bias = (config.num_hidden_layers - config.first_k_dense_replace) * config.n_routed_experts
    if bias:
        total["router"] += bias
        activated["router"] += bias
    return {name: (total[name], activated[name]) for name in total}


def flops_per_token(weights: list[Weight], config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward FLOPs of a token: 6 per activated matmul parameter, and causal attention's own.

    Attention: 2 FLOPs forward per entry of q.k and of weights.v over half of the sequence on average, three times
    that with the backward pass. Recomputation is not counted.
    """
    activated = count_parameters(weights, config)
    matmul = sum(active for name, (_, active) in activated.items() if name not in ("embedding", "norms"))
    head_dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = 3 * config.num_hidden_layers * config.num_attention_heads * head_dims * sequence_length
    return 6.0 * matmul + attention
