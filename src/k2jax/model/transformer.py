"""The Kimi K2 decoder: embedding, dense layers, MoE layers, norm, untied head.

B sequences, T positions, D hidden, V vocabulary, H heads, L layers of one stack
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.config import KernelsConfig, ModelConfig, Remat
from k2jax.dtypes import wide
from k2jax.kernels.chunked_attention import TokenIndex
from k2jax.kernels.project import project
from k2jax.model.head import head_loss
from k2jax.model.latent_attention import Latents
from k2jax.model.layer_report import LayerReport, join_stacks
from k2jax.model.mla import MLA, Positions, rms_norm
from k2jax.model.moe import MoE, SwiGLU
from k2jax.model.pipeline import pipelined
from k2jax.model.remat import ATTENDED, LAYER_INPUT, named, rematerialise
from k2jax.model.rope import Rope, make_rope, rope_angles
from k2jax.model.weights import Param, RouterBias, Stack, Weight, declare, dim_sizes
from k2jax.sharding.place import num_shards, num_stages, out_spec, place, whole
from k2jax.sharding.zigzag import zigzag


class Output(NamedTuple):
    """Result of one forward pass; floats in at least float32."""

    logits: jax.Array | None  # [B, T, V]; None with targets
    loss: jax.Array | None  # nats, summed over the targets; None without
    report: LayerReport


class Cache(NamedTuple):
    """The past as decoding keeps it: Latents with a leading dim of layers, 0 where a stack has none."""

    dense: Latents
    moe: Latents


class Layer(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(self, stack: Stack, is_moe: bool):
        self.config = stack.config
        self.attention_norm = stack.gain("D", "input_layernorm.weight")
        self.attention = MLA(stack)
        self.ffn_norm = stack.gain("D", "post_attention_layernorm.weight")
        self.ffn = MoE(stack) if is_moe else SwiGLU(stack, stack.config.intermediate_size, "dense ffn", "mlp.")

    def _normed(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.attention_norm, self.config.rms_norm_eps)

    @jax.named_scope("ffn")
    def _feed_forward(self, x_BTD: jax.Array, layout: Literal["T", "S"] = "T"):
        """layout: of the tokens; S while decoding, where they may be too few for `tensor` to cut."""
        normed_BTD = rms_norm(x_BTD, self.ffn_norm, self.config.rms_norm_eps)
        if not isinstance(self.ffn, MoE):
            return x_BTD + self.ffn(normed_BTD), LayerReport(None)
        y_BTD, report = self.ffn(normed_BTD, layout)
        return x_BTD + y_BTD, report

    def __call__(self, x_BTD: jax.Array, positions: Positions) -> tuple[jax.Array, LayerReport]:
        x_BTD = named(x_BTD, LAYER_INPUT)
        attended_BTD, max_logit_H = self.attention(self._normed(x_BTD), positions)
        x_BTD, report = self._feed_forward(named(x_BTD + attended_BTD, ATTENDED))
        return x_BTD, report._replace(max_logits=max_logit_H)

    def decode(self, x: jax.Array, positions: Positions, position_BS: jax.Array, past: Latents, layout):
        """New tokens x [B, T, D] or [B, S, D], as `layout` says."""
        attended, past = self.attention.decode(self._normed(x), positions, position_BS, past, layout)
        return self._feed_forward(x + attended, layout)[0], past


def scan_layers(layers: Layer, x_BTD: jax.Array, positions: Positions, remat: Remat):
    """Run a stack of equal layers in one scan, so that compile time does not grow with depth."""
    graph, weights = nnx.split(layers)

    def run(x_BTD, weights):
        return nnx.merge(graph, weights)(x_BTD, positions)

    with jax.named_scope("layers"):
        return jax.lax.scan(rematerialise(run, remat), x_BTD, weights)


def make_positions(positions_BT: jax.Array, segment_ids_BT: jax.Array, rope: Rope) -> Positions:
    """Rotation angles, and where tokens stand. On a mesh positions and segments are in zigzag order."""
    angles_BT = rope_angles(positions_BT, rope)
    index_BZ = zigzag(jnp.broadcast_to(jnp.arange(positions_BT.shape[1], dtype=jnp.int32), positions_BT.shape))
    q_at, k_at = (TokenIndex(place(index_BZ, dims), place(segment_ids_BT, dims)) for dims in ("BS", "BZ"))
    return Positions(rope, place(angles_BT, "BSR"), place(angles_BT, "BTR"), q_at, k_at)


class Transformer(nnx.Module):
    """The whole model; parameters are declared here and have no values until `nnx.merge` brings some."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype = jnp.float32,
        remat: Remat = "none",
        rope: str = "plain",
        kernels: KernelsConfig = KernelsConfig(),
    ):
        """rope: "plain" or "yarn", what calls use that bring no Rope."""
        num_dense = config.first_k_dense_replace
        num_moe = config.num_hidden_layers - num_dense
        sizes = dim_sizes(config)
        self.config, self.dtype, self.remat, self.rope = config, dtype, remat, rope
        self.embedding = declare(
            "", "I", "D", sizes, "model.embed_tokens.weight", hf_as_declared=True, group="adamw", component="embedding"
        )
        self.dense = Layer(Stack(config, 0, num_dense, kernels), is_moe=False) if num_dense else None
        self.moe = Layer(Stack(config, num_dense, num_moe, kernels), is_moe=True) if num_moe else None
        self.norm = declare("", "", "D", sizes, "model.norm.weight", init="ones", group="adamw", component="norms")
        self.head = declare("", "D", "V", sizes, "lm_head.weight", group="adamw", component="head")

    @jax.named_scope("embed")
    def _embed(self, tokens: jax.Array, layout: Literal["T", "S"] = "T") -> jax.Array:
        """Of tokens [B, T], [Y, B, T] or, with layout S, [B, S]."""
        # Cast after the look-up: the gradient of a frequent token's row is a sum that bf16 cannot hold.
        table_ID, dims = self.embedding.use(wide(self.dtype)), f"YB{layout}D"[-1 - tokens.ndim :]
        return table_ID.at[tokens].get(out_sharding=out_spec(dims)).astype(self.dtype)

    def _normed(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.norm, self.config.rms_norm_eps)

    def _logits(self, x_BSD: jax.Array) -> jax.Array:
        return project("BSD,DV->BSV", self._normed(x_BSD), self.head.use(self.dtype), None, wide(self.dtype))

    def _loss(self, x: jax.Array, targets: jax.Array) -> jax.Array:
        """Of x [B, T, D] and targets [B, T], or [Y, B, T, D] and [Y, B, T]."""
        # Or XLA gathers the head long before, and reduces its gradient long after: both are large, and the layers' turn
        # lies between. The barrier acts in either direction.
        x, stored_DV = jax.lax.optimization_barrier((self._normed(x), self.head[...]))
        # The head in float32: its gradient is a sum over all tokens of the step.
        return head_loss(x, place(stored_DV.astype(wide(self.dtype)), "DV"), targets)

    def _join(self, reports: list[LayerReport]) -> LayerReport:
        """The report of the whole model, on every device."""
        return join_stacks(jax.tree.map(whole, reports), self.config.n_routed_experts, wide(self.dtype))

    def __call__(self, tokens, positions=None, segment_ids=None, rope: Rope | None = None, targets=None) -> Output:
        """tokens, positions, segment_ids: int32 [B, T]. Positions count from 0 and all is one document unless given.

        Positions enter the rotation alone: a token sees those before it in the row, whatever their positions are.
        With targets [B, T] the loss takes the place of the logits, which are then never all there.
        """
        wrong = [f"{x.shape}" for x in (tokens, positions, segment_ids, targets) if x is not None and jnp.ndim(x) != 2]
        if wrong:
            raise ValueError(f"tokens, positions, segment_ids and targets must be [B, T], got {', '.join(wrong)}")
        if num_stages() > 1:
            raise ValueError(f"a mesh with stage = {num_stages()} has `losses` alone; call the model on one without")
        tokens = jnp.asarray(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.zeros_like(tokens)
        tokens_BT, positions_BT, segment_ids_BT = (
            place(zigzag(jnp.asarray(x)), "BT") for x in (tokens, positions, segment_ids)
        )
        known = make_positions(positions_BT, segment_ids_BT, rope or make_rope(self.config, self.rope))
        x_BTD = self._embed(tokens_BT)
        reports = []
        for layers in (self.dense, self.moe):
            if layers is not None:
                x_BTD, report = scan_layers(layers, x_BTD, known, self.remat)
                reports.append(report)
        report = self._join(reports)
        if targets is not None:
            return Output(None, self._loss(x_BTD, place(zigzag(jnp.asarray(targets)), "BT")), report)
        return Output(self._logits(place(zigzag(x_BTD, back=True), "BSD")), None, report)

    def losses(self, tokens_MBT, positions_MBT, segment_ids_MBT, rope: Rope, target_MBT) -> Output:
        """As a call with targets, of M microbatches together, on a mesh with pipeline stages.

        All but max_logits are sums over the microbatches. M must be a multiple of the stages.
        """

        def run(layers, x_BTD, places, rope):
            return scan_layers(layers, x_BTD, make_positions(*places, rope), self.remat)

        x_YBTD = self._embed(place(tokens_MBT, "YBT"))
        places = place(positions_MBT, "MBT"), place(segment_ids_MBT, "MBT")
        rope = jax.tree.map(jnp.asarray, rope)
        x_YBTD, reports = pipelined(self.dense, self.moe, run, x_YBTD, places, rope)
        return Output(None, self._loss(x_YBTD, target_MBT), self._join(reports))

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences of up to `length` tokens.

        On a mesh `batch` must be a multiple of replica * fsdp * expert; slots are added to `length` until `tensor`
        divides them.
        """
        config = self.config
        num_dense, num_slots = config.first_k_dense_replace, length + -length % num_shards("T")

        def stack(num_layers):
            shape = num_layers, batch, num_slots
            return Latents(
                jnp.zeros((*shape, config.kv_lora_rank), self.dtype, out_sharding=out_spec("LBTC")),
                jnp.zeros((*shape, config.qk_rope_head_dim), self.dtype, out_sharding=out_spec("LBTR")),
            )

        return Cache(stack(num_dense), stack(config.num_hidden_layers - num_dense))

    def decode(self, tokens, start_B, last_B, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits [B, V] after token `last` of each row of new tokens [B, S], at positions start, start + 1, ...

        Rows may be padded beyond `last`: what the padding leaves in the cache is seen by nobody before the next tokens
        overwrite it. On a mesh with stage and context 1. Where `tensor` divides S the residual stream is cut over it as
        in training; else, as of single tokens, each device of that axis has all of them.
        """
        layout = "S" if tokens.shape[1] % num_shards("T") else "T"
        position_BS = place(jnp.asarray(start_B)[:, None] + jnp.arange(tokens.shape[1]), "BS")
        rope = make_rope(self.config, self.rope)
        angles_BS = rope_angles(position_BS, rope)
        known = Positions(rope, angles_BS, place(angles_BS, f"B{layout}R"), None, None)
        x, stacks = self._embed(place(jnp.asarray(tokens), f"B{layout}"), layout), []
        for layers, past in zip((self.dense, self.moe), cache, strict=True):
            if layers is not None:
                graph, weights = nnx.split(layers)

                def run(x, layer, graph=graph):
                    weights, past = layer
                    return nnx.merge(graph, weights).decode(x, known, position_BS, past, layout)

                x, past = jax.lax.scan(run, x, (weights, past))
            stacks.append(past)
        # Chosen by a mask and not by index, which explicit shardings could not follow; a sum with zeros is exact.
        is_last_BS = place(jnp.arange(x.shape[1]) == jnp.asarray(last_B)[:, None], "BS")
        x_BSD = jnp.where(is_last_BS[..., None], place(x, "BSD"), 0).sum(1, keepdims=True)
        return self._logits(x_BSD)[:, 0], Cache(*stacks)


def _declared(config: ModelConfig, kind: type) -> dict:
    state = nnx.state(Transformer(config), kind)
    return nnx.to_pure_dict(jax.tree.map(lambda v: v.weight, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def declarations(config: ModelConfig) -> dict:
    """Pytree of Weight, in the shape of the parameters' pytree."""
    return _declared(config, Param)


def bias_declarations(config: ModelConfig) -> dict:
    """Pytree of Weight, in the shape of the router biases' pytree."""
    return _declared(config, RouterBias)


def build_model(
    config: ModelConfig,
    params: dict,
    router_bias: dict,
    dtype: jnp.dtype,
    remat: Remat = "none",
    rope: Literal["plain", "yarn"] = "plain",
    kernels: KernelsConfig = KernelsConfig(),
) -> Transformer:
    """The model with these values: pytrees as `declarations` and `bias_declarations` shape them."""
    graph, _, _ = nnx.split(Transformer(config, dtype, remat, rope, kernels), Param, RouterBias)
    return nnx.merge(graph, params, router_bias)


def init_router_bias(config: ModelConfig) -> dict:
    """All zeros: float32 [MoE layers, E] under the model's own path to it."""
    return jax.tree.map(
        lambda w: jnp.zeros(w.shape), bias_declarations(config), is_leaf=lambda x: isinstance(x, Weight)
    )

