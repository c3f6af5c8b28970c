"""Rematerialisation: which activations are saved for the backward pass and which are recomputed.

A policy lists what is saved, not what is recomputed: a value that is recomputed under its name could still be saved
without one, a single operation earlier, and no memory would be gained.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from k2jax.config import Remat
from k2jax.kernels.chunked_attention import ATTENTION_LSE, ATTENTION_OUT

# The residual stream where a layer begins.
LAYER_INPUT = "layer_input"
# The residual stream between attention and FFN.
ATTENDED = "attended"
# What the MLA up-projections read, before its norm; the rotary key is in the second.
Q_LATENT, KV_LATENT = "q_latent", "kv_latent"
# Scores of the router, and the experts that each token chose.
ROUTER_LOGITS, EXPERT_CHOICE = "router_logits", "expert_choice"
# Rows that the experts work on, and their weights, as they came; inputs of SwiGLU in every FFN.
DISPATCHED, ROW_WEIGHT, GATE_UP = "dispatched", "row_weight", "gate_up"

# The K2 report (2.4.3) makes norms, SwiGLU, MLA up-projections and MoE down-projections again; these are the rest.
KEPT_BY_K2 = (
    LAYER_INPUT, ATTENDED, Q_LATENT, KV_LATENT, ATTENTION_OUT, ATTENTION_LSE, ROUTER_LOGITS, DISPATCHED, GATE_UP,
)  # fmt: skip
# Kept, on the device, whatever else is made again. Scores that differ in their last bit would choose other experts,
# and the backward pass would be that of another function than the forward pass. Rows' weights, 4 bytes each, would
# cross the mesh again.
ALWAYS_KEPT = (EXPERT_CHOICE, ROW_WEIGHT)


def named(x: jax.Array, name: str) -> jax.Array:
    """`x`, which policies know by `name`, one of the above."""
    return checkpoint_name(x, name)


def _policy(kept: tuple[str, ...], offloaded: tuple[str, ...]):
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=ALWAYS_KEPT + kept,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )


def rematerialise_stage(stage: Callable) -> Callable:
    """`stage`, all layers of a pipeline stage: only the input of each microbatch is saved for its backward pass."""
    return jax.checkpoint(stage, policy=_policy((), ()))


def rematerialise(layer: Callable, remat: Remat) -> Callable:
    """`layer`, whose backward pass recomputes what the policy `remat` does not save.

    none: all is saved. k2: what K2 saves. layer: the layer's input alone. k2-offload and offload: the same two, saved
    in host memory.
    """
    policies = {
        "k2": _policy(KEPT_BY_K2, ()),
        "k2-offload": _policy((), KEPT_BY_K2),
        "layer": _policy((LAYER_INPUT,), ()),
        "offload": _policy((), (LAYER_INPUT,)),
    }
    return layer if remat == "none" else jax.checkpoint(layer, policy=policies[remat])
