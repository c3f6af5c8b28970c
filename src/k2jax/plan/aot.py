"""The whole training step compiled for hardware that is not here: does it fit, and what does it communicate?

The compiler is the real one, so the figures are evidence and no estimate; nothing is run, and no weight is made.
"""

import math
import time
from collections.abc import Mapping

import jax

from k2jax.config import Config
from k2jax.errors import RunFailed
from k2jax.model.choices import describe_attention, describe_experts
from k2jax.optim.spread import chunks
from k2jax.plan.chips import is_known
from k2jax.plan.collectives import Collective, collectives, part_of, slice_exchanges
from k2jax.plan.muon_work import muon_assignments
from k2jax.plan.program_report import describe_program, program_lines
from k2jax.plan.topology import MEMORY_BYTES
from k2jax.preflight.availability import check_kernels
from k2jax.sharding.compile_options import describe_options, options_without_device, refusing_options
from k2jax.sharding.device_order import domain_counts, fast_domains
from k2jax.sharding.host_picture import picture_hosts
from k2jax.tables import aligned
from k2jax.train.banner import bytes_per_device
from k2jax.train.batch import Batch
from k2jax.train.compile_step import abstract_batch, lower_step
from k2jax.train.state import TrainState

GIB = 2**30


def memory_by_kind(state: TrainState, batch: Batch, compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device. Kinds that XLA tells apart, with what the shapes say of them:

    arguments = parameters + optimizer_state + other_state + batch + what tiling adds; temp = gradients + activations,
    where gradients are one set in float32, laid out as the parameters, and activations all else. outputs: those that
    do not take the place of a donated argument. total: all of it, the program too.
    """
    found = compiled.memory_analysis()
    params, optimizer = bytes_per_device(state.params), bytes_per_device(state.opt_state)
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    program = found.generated_code_size_in_bytes
    return {
        "parameters": params,
        "optimizer_state": optimizer,
        "other_state": bytes_per_device((state.step, state.router_bias, state.guard)),
        "batch": bytes_per_device(batch),
        "arguments": found.argument_size_in_bytes,
        "gradients": params,
        "activations": found.temp_size_in_bytes - params,
        "temp": found.temp_size_in_bytes,
        "outputs": outputs,
        "program": program,
        "host": found.host_temp_size_in_bytes + found.host_argument_size_in_bytes,
        "total": found.argument_size_in_bytes + found.temp_size_in_bytes + outputs + program,
    }


def communication(found: list[Collective]) -> list[dict]:
    """JSON values: collectives by part of the step, kind and mesh axes.

    instructions: in the program; runs: in one step, None where data decides; bytes: on one device, over all runs.
    """
    table = {}
    for one in found:
        row = table.setdefault((part_of(one), one.kind, one.axes), {"instructions": 0, "runs": 0, "bytes": 0})
        row["instructions"] += 1
        known = one.runs is not None and row["runs"] is not None
        row["runs"] = row["runs"] + one.runs if known else None
        row["bytes"] = row["bytes"] + one.runs * one.num_bytes if known else None
    order = ("forward", "backward", "optimizer", "other")
    keys = sorted(table, key=lambda key: (order.index(key[0]), key[2], key[1]))
    return [{"part": key[0], "kind": key[1], "axes": list(key[2]), **table[key]} for key in keys]


def expected_exchanges(config: Config, sizes: Mapping[str, int]) -> int:
    """All-to-alls of the optimizer: one in and one out for each chunk of each leaf that is cut inside its matrices."""
    size = {"bfloat16": 2, "float32": 4}[config.optim.ns_dtype]
    return sum(
        2 * len(list(chunks(assignment, weight.shape[weight.num_stack :], size)))
        for _, weight, assignment in muon_assignments(config, sizes)
        if assignment.group > 1
    )


def beyond_exchanges(found: list[Collective], num_exchanges: int) -> list[str]:
    """Collectives on the optimizer's matrices beyond `num_exchanges` all-to-alls outside of loops; [] if none."""
    problems = []
    for one in found:
        if one.has_matrix and one.kind != "all-to-all":
            problems.append(f"{one.kind} of {one.result}")
        if one.repeated:
            problems.append(f"{one.kind} of {one.result} in a loop or branch")
    count = sum(one.kind == "all-to-all" for one in found)
    if count != num_exchanges:
        problems.append(f"{count} all-to-alls, where the assignments need {num_exchanges}")
    return problems


def compile_step(lowered: jax.stages.Lowered, options: Mapping[str, str] | None = None) -> jax.stages.Compiled:
    """Raises RunFailed, with the compiler's list of what is large, where a TPU has not the memory.

    options: besides those that the step is lowered with.
    """
    try:
        with refusing_options():
            return lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunFailed(f"does not fit: {error}") from None


def check_fit(memory: Mapping[str, int], device_kind: str) -> None:
    """Raises RunFailed where a device has not the memory: XLA:GPU compiles what does not fit."""
    limit = MEMORY_BYTES.get(device_kind)
    if limit is None or memory["total"] <= limit:
        return
    kinds = ", ".join(f"{name} {memory[name] / GIB:.2f}G" for name in ("arguments", "temp", "outputs", "program"))
    total, room = (size / GIB for size in (memory["total"], limit))
    raise RunFailed(
        f"does not fit: used {total:.2f}G of {room:.2f}G of {device_kind}: {kinds}; exceeded by {total - room:.2f}G"
    )


def program_text(compiled: jax.stages.Compiled) -> str:
    """The HLO of a compiled step. Raises RunFailed where this jaxlib is older than what libtpu writes."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunFailed(
            f"compiled, but jax {jax.__version__} cannot read the program that libtpu wrote ({reason}); "
            f"jax 0.11.2 can: use Python 3.12"
        ) from None


def slices_along(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """The number of slices along each axis; their product is that of the slices."""
    return domain_counts(dict(mesh.shape), fast_domains(mesh.devices.ravel().tolist()))


def is_one_program(mesh: jax.sharding.Mesh) -> bool:
    """True if the HLO is that of all devices: of GPUs always, of TPUs if they are one slice."""
    return mesh.devices.flat[0].platform == "gpu" or math.prod(slices_along(mesh).values()) == 1


def step_collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
    """All collectives of a step's HLO, those between slices too."""
    if is_one_program(mesh):
        return collectives(text, mesh.shape)
    slices = slices_along(mesh)
    inside = {axis: size // slices[axis] for axis, size in mesh.shape.items()}
    crossed = tuple(axis for axis, count in slices.items() if count > 1)
    return collectives(text, inside) + slice_exchanges(text, crossed)


def has_figures(mesh: jax.sharding.Mesh) -> bool:
    """True if the program of such a mesh can be played: chips with known figures, in one slice if they are TPUs."""
    return is_known(mesh.devices.flat[0].device_kind) and is_one_program(mesh)


def describe_step(config: Config, mesh: jax.sharding.Mesh, options: Mapping[str, str] | None = None) -> dict:
    """JSON values: what `k2jax plan` prints.

    Raises UserError for kernels or options that the devices do not have, RunFailed if the step does not fit one.
    """
    check_kernels(config, mesh)
    started = time.monotonic()
    lowered, state = lower_step(config, mesh)
    lower_seconds = time.monotonic() - started
    kind = mesh.devices.flat[0].device_kind
    compiled = compile_step(lowered, options_without_device(mesh) | dict(options or {}))
    memory = memory_by_kind(state, abstract_batch(config, mesh), compiled)
    check_fit(memory, kind)
    compile_seconds = time.monotonic() - started - lower_seconds
    text = program_text(compiled)
    found = step_collectives(text, mesh)
    slices = slices_along(mesh)
    beyond = None  # libtpu does not say whence the collectives of several slices come
    if is_one_program(mesh):
        optimizer = [one for one in found if part_of(one) == "optimizer"]
        beyond = beyond_exchanges(optimizer, expected_exchanges(config, mesh.shape))
    tokens = config.batch_tokens // config.train.num_microbatches // (mesh.size // mesh.shape["stage"])
    return {
        "device_kind": kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "slices": slices,
        "hosts": picture_hosts(mesh),
        "tokens_per_device_and_microbatch": tokens,
        "kernels": [f"attention: {describe_attention(config, mesh)}", f"experts: {describe_experts(config, mesh)}"],
        "compiler_options": describe_options(config.kernels, mesh),
        "lower_seconds": lower_seconds,
        "compile_seconds": compile_seconds,
        "memory": memory,
        "memory_of_device": MEMORY_BYTES.get(kind),
        "communication": communication(found),
        "optimizer_beyond_exchanges": beyond,
        "program": describe_program(text, config, mesh) if has_figures(mesh) else None,
    }


MEMORY_ROWS = (
    ("parameters", "parameters"),
    ("optimizer_state", "optimizer's state"),
    ("other_state", "router bias, guard, step"),
    ("batch", "batch"),
    ("arguments", "arguments: these, tiled"),
    ("gradients", "gradients, float32"),
    ("activations", "activations and all else"),
    ("temp", "temporary: these two"),
    ("outputs", "outputs beside the state"),
    ("program", "program"),
    ("total", "together"),
    ("host", "in the host's memory"),
)


def plan_lines(found: dict) -> list[str]:
    """`describe_step` as text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    memory = [("per device", "bytes", "GiB")]
    for key, name in MEMORY_ROWS:
        size = found["memory"][key]
        memory.append((name, f"{size:,}", f"{size / GIB:.2f}"))
    if limit := found["memory_of_device"]:
        memory.append(("a device has", f"{limit:,}", f"{limit / GIB:.2f}"))
    traffic = [("part", "collective", "over", "instructions", "runs in a step", "GiB in a step")]
    for row in found["communication"]:
        runs, size = row["runs"], row["bytes"]
        traffic.append(
            (
                row["part"],
                row["kind"],
                ", ".join(row["axes"]) or "itself",
                str(row["instructions"]),
                "as data decides" if runs is None else f"{runs:,}",
                "" if size is None else f"{size / GIB:.3f}",
            )
        )
    beyond = found["optimizer_beyond_exchanges"]
    matrices = "not told for several slices: plan one"
    if beyond is not None:
        matrices = "; ".join(beyond) or "all-to-all and nothing else"
    return [
        f"{found['devices']:,} x {found['device_kind']}, {mesh or 'one device'}; "
        f"{found['tokens_per_device_and_microbatch']:,} tokens per device and microbatch",
        *found["hosts"],
        *found["kernels"],
        f"compiler: {found['compiler_options']}",
        f"lowered in {found['lower_seconds']:.1f} s, compiled in {found['compile_seconds']:.0f} s",
        "",
        *aligned(memory),
        "",
        *aligned(traffic),
        "",
        f"the optimizer's matrices: {matrices}",
        *(["", *program_lines(found["program"])] if found["program"] else []),
    ]
