"""Options of XLA that a program needs on a platform: of the training step, of `k2jax plan` and of inference alike.

Each has its reason; a test of the marker `gpu` or `tpu` fails when upstream no longer needs it.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

from k2jax.config import KernelsConfig
from k2jax.config_rules import read_options
from k2jax.errors import UserError

OptionValue = str | bool | int
REFUSED = "No such compile option", "While setting option"  # in what XLA says


class CompileOption(NamedTuple):
    """An option as `jax.stages.Lowered.compile` takes it, and why it is set."""

    name: str
    value: OptionValue
    reason: str


_OFFLOAD = "SparseCore runs it beside matmuls, where the TensorCore would wait for it"
_NOT_FUSED = "what is fused with matmuls is not given to SparseCore"
_TRACED = "shows in a profile what SparseCore does"
_UNDOCUMENTED = "undocumented; MaxText and AXLearn set it wherever SparseCore runs collectives, and it was compiled so here"

# By the platform, as `place.platform` names it.
OPTIONS = {
    "cpu": (),
    "gpu": (
        CompileOption(
            "xla_disable_hlo_passes",
            "all-reduce-reassociate",
            "it adds up before it reduces, in bf16 what we reduce in float32, and leaves a reduce-scatter of both "
            "dtypes that XLA's own verifier refuses",
        ),
        CompileOption(
            "xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer",
            False,
            "between hosts it makes of the experts' exchange an all-gather of every device's buffer",
        ),
    ),
    "tpu": (
        CompileOption(
            "xla_tpu_scoped_vmem_limit_kib",
            28_672,
            "by default lax.ragged_dot has 16 MiB and takes 128 columns at a time, so that rows are read 32 times from "
            "HBM; of 16 to 80 MiB this gives tiles that divide K2's widths and the least time: docs/experts.md",
        ),
        *(
            CompileOption(f"xla_tpu_enable_sparse_core_collective_offload_{kind}", True, _OFFLOAD)
            # Not all_reduce: of one in bf16 in K2's layers on 1,024 v5p libtpu 0.0.52 makes a program that it then refuses
            # ('sc_tpu.vector_store' of float32 into bf16). benchmarks/programs.py --layers shows whether it still does.
            for kind in ("all_gather", "reduce_scatter", "ragged_all_to_all")
        ),
        *(
            CompileOption(f"xla_tpu_enable_async_collective_fusion_fuse_{kind}", False, _NOT_FUSED)
            for kind in ("all_gather", "all_reduce", "reduce_scatter")
        ),
        *(
            CompileOption(f"xla_tpu_enable_{kind}_offload_tracing", True, _TRACED)
            for kind in ("all_gather", "reduce_scatter")
        ),
        *(
            CompileOption(name, value, _UNDOCUMENTED)
            for name, value in (
                ("xla_tpu_use_tc_device_shape_on_sc", True),
                ("xla_sc_disable_megacore_partitioning", True),
                ("xla_sc_enable_instruction_fusion", False),
            )
        ),
    ),
}
# What a compiler without the device that it compiles for needs besides.
WITHOUT_DEVICE = {
    "gpu": (
        CompileOption(
            "xla_gpu_enable_cub_radix_sort", False, "CUB's sort asks the device for the size of its scratch memory"
        ),
    ),
}


def compile_options(platform: str) -> dict[str, OptionValue]:
    """The options of every program for `platform` ("cpu", "gpu", "tpu")."""
    return {option.name: option.value for option in OPTIONS[platform]}


def options_without_device(mesh: jax.sharding.Mesh) -> dict[str, OptionValue]:
    """Options that compiling for the devices of `mesh` takes besides where they are not here."""
    return {option.name: option.value for option in WITHOUT_DEVICE.get(mesh.devices.flat[0].platform, ())}


def program_options(kernels: KernelsConfig, mesh: jax.sharding.Mesh | None = None) -> dict[str, OptionValue]:
    """The options, for `jax.jit`, of a program on `mesh` (None: jax's own default device).

    Those of `compile_options`, with the user's in their place or beside them.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return compile_options(platform) | read_options(kernels.compiler_options or ())


def describe_options(kernels: KernelsConfig, mesh: jax.sharding.Mesh) -> str:
    """The options in words."""
    options = program_options(kernels, mesh)
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "no options"


@contextlib.contextmanager
def refusing_options() -> Iterator[None]:
    """Options that the compiler does not know, or whose value it cannot read, raise UserError inside."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(words in str(error) for words in REFUSED):
            raise
        raise UserError(f"kernels.compiler_options: XLA refuses one: {str(error).splitlines()[0]}") from None
