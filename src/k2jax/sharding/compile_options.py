"""Options of XLA that a program needs on a platform: of the training step, of `k2jax plan` and of inference alike.

Each has its reason; a test of the marker `gpu` or `tpu` fails when upstream no longer needs it.
"""

from collections.abc import Sequence
from typing import NamedTuple

OptionValue = str | bool | int


class CompileOption(NamedTuple):
    """An option as `jax.stages.Lowered.compile` takes it, and why it is set."""

    name: str
    value: OptionValue
    reason: str


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
    "tpu": (),
}
# What a compiler without the device that it compiles for needs besides.
WITHOUT_DEVICE = {
    "gpu": (
        CompileOption(
            "xla_gpu_enable_cub_radix_sort", False, "CUB's sort asks the device for the size of its scratch memory"
        ),
    ),
}


def read_options(given: Sequence[str]) -> dict[str, str]:
    """{"xla_flag": "value"} of "xla_flag=value" each. ValueError with the rule that one breaks."""
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.startswith("xla_") and name.isidentifier()):
            raise ValueError(f"{text!r} must be NAME=VALUE with a name such as 'xla_gpu_graph_level=0'")
        if name in options:
            raise ValueError(f"{name!r} must be given once")
        options[name] = value
    return options


def compile_options(platform: str, given: Sequence[str] = (), has_device: bool = True) -> dict[str, OptionValue]:
    """The options of a program for `platform` ("cpu", "gpu", "tpu"), with those of a user in their place or beside them.

    given: kernels.compiler_options. has_device: False where the program is compiled for a machine that is not here.
    """
    own = OPTIONS[platform] + (() if has_device else WITHOUT_DEVICE.get(platform, ()))
    return {option.name: option.value for option in own} | read_options(given)
