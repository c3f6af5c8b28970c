"""The MoE layers of a training step as a program of their own: most of a step's time, half of its compiling."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from k2jax.config import Config
from k2jax.errors import UserError
from k2jax.model.rope import make_rope
from k2jax.model.transformer import Transformer, make_positions, scan_layers
from k2jax.model.weights import Param, RouterBias
from k2jax.plan.aot import compile_step, program_text
from k2jax.plan.chips import network_of
from k2jax.plan.layer_metrics import LayerMetrics
from k2jax.plan.program import Program
from k2jax.sharding.compile_options import options_without_device, program_options
from k2jax.sharding.place import place
from k2jax.sharding.rules import spec
from k2jax.train.state import abstract_model


def lower_layers(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """Forward and backward pass of one microbatch through the MoE layers, without embedding, head and optimizer.

    Its layer loops are those of the whole step: the same scan, rematerialisation and gradients summed over the mesh.
    One microbatch as `train.num_microbatches` cuts it. Raises UserError for a config with pipeline stages, whose loops
    are others, or without MoE layers.
    """
    wrong = []
    if config.mesh.stage > 1:
        wrong.append(f"mesh.stage = {config.mesh.stage}: the layers alone have no pipeline; nearest: mesh.stage = 1")
    if config.model.first_k_dense_replace == config.model.num_hidden_layers:
        num_layers = config.model.num_hidden_layers
        wrong.append(
            f"model.first_k_dense_replace = {num_layers}: all {num_layers} layers are dense; nearest: {num_layers - 1}"
        )
    if wrong:
        raise UserError("\n".join(wrong))
    dtype = jnp.dtype(config.train.compute_dtype)
    model = Transformer(config.model, dtype, config.train.remat, kernels=config.kernels)
    graph, _, _ = nnx.split(model.moe, Param, RouterBias)

    def objective(weights, x_BTD, bias, positions_BT, segment_ids_BT):
        known = make_positions(positions_BT, segment_ids_BT, make_rope(config.model, "plain"))
        x_BTD, report = scan_layers(nnx.merge(graph, weights, bias), place(x_BTD, "BTD"), known, config.train.remat)
        # A sum of squares, whose gradient differs from row to row as the head's does: no pass can simplify it.
        return jnp.sum(jnp.square(x_BTD.astype(jnp.float32))) + jnp.sum(report.balance_loss), report

    shape = config.data.batch_sequences // config.train.num_microbatches, config.data.sequence_length
    tokens = jax.NamedSharding(mesh, spec("BT"))
    index = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=tokens)
    rows = jax.NamedSharding(mesh, spec("BTD"))
    x = jax.ShapeDtypeStruct((*shape, config.model.hidden_size), dtype, sharding=rows)
    params, bias = abstract_model(config, mesh)
    with jax.set_mesh(mesh):
        options = program_options(config.kernels, mesh)
        step = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True), compiler_options=options)
        return step.lower(params["moe"], x, bias["moe"], index, index)


def describe_layers(config: Config, mesh: jax.sharding.Mesh, options: Mapping[str, str] | None = None) -> dict:
    """JSON values: {"layer": the figures of one layer and microbatch, "temp": bytes beside the arguments}.

    In half of the time that a whole step takes to compile. "layer" is None where XLA left no loop over layers, as of a
    single one. Raises UserError as `lower_layers` does, and for devices without figures.
    """
    network = network_of(mesh)
    compiled = compile_step(lower_layers(config, mesh), options_without_device(mesh) | dict(options or {}))
    program = Program(program_text(compiled), config, network)
    return {
        "layer": LayerMetrics(program).describe() if program.layer_bodies else None,
        "temp": compiled.memory_analysis().temp_size_in_bytes,
    }
