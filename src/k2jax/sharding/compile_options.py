"""Options of XLA that a program needs on a platform: of the training step, of `k2jax plan` and of inference alike."""

from typing import NamedTuple

OptionValue = str | bool | int


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
    "gpu": (),
    "tpu": (
        CompileOption(
            "xla_tpu_scoped_vmem_limit_kib",
            28_672,
            "by default lax.ragged_dot has 16 MiB and takes 128 columns at a time, so that rows are read 32 times from "
            "HBM; of 16 to 80 MiB this gives tiles that divide K2's widths and the least time: docs/experts.md",
        ),
        *(
            CompileOption(f"xla_tpu_enable_sparse_core_collective_offload_{kind}", True, _OFFLOAD)
            for kind in ("all_gather", "all_reduce", "reduce_scatter", "ragged_all_to_all")
        ),
        *(
            CompileOption(f"xla_tpu_enable_async_collective_fusion_fuse_{kind}", False, _NOT_FUSED)
            for kind in ("all_gather", "all_reduce", "reduce_scatter")
        ),
        *(
            CompileOption(f"xla_tpu_enable_{kind}_offload_tracing", True, _TRACED)
            for kind in ("all_gather", "all_reduce", "reduce_scatter")
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


def compile_options(platform: str) -> dict[str, OptionValue]:
    """The options of every program for `platform` ("cpu", "gpu", "tpu")."""
    return {option.name: option.value for option in OPTIONS[platform]}
