"""A weight is declared once; shape, sharding, fan-in, optimizer group and counts all derive from that."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from k2jax.config import KernelsConfig, ModelConfig
from k2jax.dtypes import wide
from k2jax.sharding.place import place
from k2jax.sharding.rules import stored_spec


@dataclass(frozen=True)
class QKSlice:
    """The runs of a projection's last dim that QK-Clip scales, with their powers: K2 report 2.1.

    `powers`: (size, power) runs along the last dim; a head's factor g acts as g**power on each run.
    """

    powers: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Weight:
    """Declaration of one parameter. Its dims are `stack + inputs + outputs`, letters of sharding/names.py.

    stack: dims that count equal weights (layers, experts); inputs: contracted with the activation. The layers are
    [first_layer, first_layer + L). hf: name of each published tensor, with {L} for the layer and {E} for the expert;
    published matrices are [outputs, inputs], but for a look-up table, which is `hf_as_declared`.
    """

    stack: str
    inputs: str
    outputs: str
    shape: tuple[int, ...]
    hf: str
    hf_as_declared: bool = False
    first_layer: int = 0
    init: Literal["normal", "ones", "zeros"] = "normal"
    group: Literal["muon", "adamw", None] = "muon"
    component: str = "attention"
    qk: QKSlice | None = None

    @property
    def dims(self) -> str:
        return self.stack + self.inputs + self.outputs

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def num_stack(self) -> int:
        return len(self.stack)

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def dtype_in_use(self, dtype: jnp.dtype) -> jnp.dtype:
        """`dtype`, that of activations; but gains and the router act in at least float32."""
        return dtype if self.inputs and self.component != "router" else wide(dtype)

    def spec(self, sizes: Mapping[str, int]) -> P:
        """Layout at rest on a mesh with axes of these sizes."""
        return stored_spec(self.dims, self.inputs + self.outputs if self.inputs else "", self.shape, sizes)


class Param(nnx.Param):
    """A parameter that knows its declaration, and is taken for use through `use`."""

    def use(self, dtype: jnp.dtype) -> jax.Array:
        """The value in `dtype`, gathered over the axes that cut it at rest alone (its gradient is scattered back)."""
        weight = self.weight
        value = self[...]
        return place(value.astype(dtype), weight.dims[-value.ndim :])  # a scan over layers has taken the leading L


class RouterBias(nnx.Variable):
    """The balancing bias [E]: part of the train state, but of no optimizer (Wang et al., arXiv 2408.15664).

    Knows its declaration too.
    """


def dim_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every dim letter that a weight may have; F is left to the FFN that declares it."""
    return {
        "D": config.hidden_size,
        "Q": config.q_lora_rank or 0,
        "C": config.kv_lora_rank,
        "J": config.kv_lora_rank + config.qk_rope_head_dim,
        "H": config.num_attention_heads,
        "K": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "U": config.v_head_dim,
        "G": config.qk_nope_head_dim + config.v_head_dim,
        "E": config.n_routed_experts,
        "X": config.n_routed_experts,
        "V": config.vocab_size,
        "I": config.vocab_size,
    }


@dataclass(frozen=True)
class Stack:
    """Equal layers that one scan runs through: layers [first_layer, first_layer + num_layers)."""

    config: ModelConfig
    first_layer: int
    num_layers: int
    kernels: KernelsConfig = KernelsConfig()

    def weight(
        self, equation: str, hf: str, stack: str = "", qk_powers=None, F: int = 0, kind=Param, **declaration
    ) -> nnx.Variable:
        """Declare a weight "inputs>outputs" of every layer, e.g. "Q>HK"; `stack` names dims after L.

        hf: the published name within a layer, without ".weight".
        """
        inputs, outputs = equation.split(">")
        sizes = dim_sizes(self.config) | {"L": self.num_layers, "F": F}
        return declare(
            "L" + stack,
            inputs,
            outputs,
            sizes,
            "model.layers.{L}." + hf,
            kind,
            first_layer=self.first_layer,
            qk=QKSlice(qk_powers) if qk_powers else None,
            **declaration,
        )

    def gain(self, dim: str, hf: str) -> Param:
        """Declare an RMSNorm gain: no matrix, so AdamW's."""
        return self.weight(f">{dim}", hf, init="ones", group="adamw", component="norms")


def declare(stack: str, inputs: str, outputs: str, sizes: dict[str, int], hf: str, kind=Param, **declaration):
    """A variable of `kind` without a value; `init_params` makes values, `nnx.merge` brings the two together."""
    shape = tuple(sizes[dim] for dim in stack + inputs + outputs)
    return kind(
        jax.ShapeDtypeStruct(shape, jnp.float32), weight=Weight(stack, inputs, outputs, shape, hf, **declaration)
    )


def init_params(weights, key: jax.Array, std: float):
    """Fp32 values for a pytree of Weight: N(0, std) matrices, gains of one, biases of zero.

    Each value depends on `key` and its own path alone, so it is the same on every mesh (to float32 rounding)
    and with other weights around it.
    """

    sizes = jax.sharding.get_abstract_mesh().shape

    def init(path, weight: Weight):
        out_sharding = weight.spec(sizes) if sizes else None
        if weight.init != "normal":
            value = {"ones": 1.0, "zeros": 0.0}[weight.init]
            return jnp.full(weight.shape, value, jnp.float32, out_sharding=out_sharding)
        own_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return std * jax.random.normal(own_key, weight.shape, jnp.float32, out_sharding=out_sharding)

    return jax.tree_util.tree_map_with_path(init, weights, is_leaf=lambda x: isinstance(x, Weight))


def weight_leaves(weights) -> list[Weight]:
    """The declarations in a pytree of them."""
    return jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, Weight))
