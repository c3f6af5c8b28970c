"""Options of the compiler: the platform's own, those of a user, and messages for wrong ones."""

import jax
import jax.numpy as jnp
import pytest

from k2jax.config import Config, KernelsConfig
from k2jax.errors import UserError
from k2jax.sharding.compile_options import (
    OPTIONS,
    WITHOUT_DEVICE,
    compile_options,
    describe_options,
    options_without_device,
    program_options,
    refusing_options,
)


class FakeMesh:
    """One device of a platform."""

    def __init__(self, platform):
        device = type("Device", (), {"platform": platform})()
        self.devices = type("Devices", (), {"flat": [device]})()


def test_a_users_option_stands_beside_ours_or_in_their_place():
    given = KernelsConfig(compiler_options=("xla_disable_hlo_passes=", "xla_gpu_graph_level=0"))
    options = program_options(given, FakeMesh("gpu"))
    assert options == compile_options("gpu") | {"xla_disable_hlo_passes": "", "xla_gpu_graph_level": "0"}
    assert program_options(KernelsConfig()) == compile_options("cpu")  # jax's own devices


def test_only_a_compiler_without_the_device_avoids_its_sort():
    (name,) = options_without_device(FakeMesh("gpu"))
    assert name not in compile_options("gpu") and options_without_device(FakeMesh("cpu")) == {}


def test_every_option_has_a_reason():
    options = [option for table in (OPTIONS, WITHOUT_DEVICE) for each in table.values() for option in each]
    assert options and all(option.name.startswith("xla_") and len(option.reason) > 20 for option in options)


def test_in_words():
    assert describe_options(KernelsConfig(), FakeMesh("cpu")) == "no options"
    text = describe_options(KernelsConfig(compiler_options=("xla_a=1", "xla_b=x=y")), FakeMesh("cpu"))
    assert text == "xla_a=1, xla_b=x=y"


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (("jax_flag=1",), "'jax_flag=1' must be NAME=VALUE"),
        (("xla_flag",), "'xla_flag' must be NAME=VALUE"),
        (("--xla_flag=1",), "'--xla_flag=1' must be NAME=VALUE"),
        (("xla_flag=1", "xla_flag=2"), "'xla_flag' must be given once"),
    ],
)
def test_what_is_no_option(given, rule):
    assert [problem for problem in Config(kernels=KernelsConfig(compiler_options=given)).problems() if rule in problem]


@pytest.mark.parametrize("option", ["xla_no_such_option", "xla_cpu_enable_fast_math"])
def test_an_option_that_xla_refuses(option):
    options = program_options(KernelsConfig(compiler_options=(f"{option}=perhaps",)))
    with pytest.raises(UserError, match=f"kernels.compiler_options: XLA refuses one: .*{option}"), refusing_options():
        jax.jit(lambda x: x + 1, compiler_options=options)(jnp.zeros(2))
