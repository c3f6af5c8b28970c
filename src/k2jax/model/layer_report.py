"""Statistics of the layers, in one shape from a single layer to the metrics of a step."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerReport(NamedTuple):
    """Statistics of one layer over the whole batch; of a stack or a model each field has a leading dim of layers.

    A dense layer has `max_logits` alone, its other fields are None. Of a model they cover its MoE layers.
    """

    max_logits: jax.Array  # [H]: largest scaled attention logit of each head
    expert_load: jax.Array | None = None  # [E] int32: rows that the router chose for each expert
    rows_dropped: jax.Array | None = None  # int32: rows that no expert worked on, because a bounded buffer was full
    balance_loss: jax.Array | None = None  # `moe.sequence_balance`, mean over sequences


def join_stacks(reports: Sequence[LayerReport], num_experts: int, dtype: jnp.dtype) -> LayerReport:
    """The report of a model from those of its stacks, the dense one first; at most one stack has MoE layers.

    Without MoE layers their fields are empty: expert_load [0, num_experts], balance_loss [0] of `dtype`.
    """
    none = LayerReport(None, jnp.zeros((0, num_experts), jnp.int32), jnp.zeros(0, jnp.int32), jnp.zeros(0, dtype))
    routed = next((report for report in reports if report.expert_load is not None), none)
    return routed._replace(max_logits=jnp.concatenate([report.max_logits for report in reports]))
