"""FLOPs and bytes of instructions, against closed forms; and of compiled programs whose matmuls are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.plan.chips import Chip, Network
from k2jax.plan.costs import Costs
from k2jax.plan.hlo import parse
from k2jax.plan.loops import Loops
from k2jax.plan.schedule import Schedule

MODULE = """\
%slice.inner (x: bf16[64,4096,192], i: s32[]) -> bf16[64,256,192] {
  %x = bf16[64,4096,192]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %part = bf16[64,256,192]{2,1,0} dynamic-slice(%x, %i, %i, %i), dynamic_slice_sizes={64,256,192}
  ROOT %same = bf16[64,256,192]{2,1,0} bitcast(%part)
}

%read.part (x: bf16[64,4096,192], i: s32[], y: bf16[64,256,192]) -> f32[64,256,256] {
  %x = bf16[64,4096,192]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = bf16[64,256,192]{2,1,0} parameter(2)
  %part = bf16[64,256,192]{2,1,0} fusion(%x, %i), kind=kLoop, calls=%slice.inner
  ROOT %c = f32[64,256,256]{2,1,0} convolution(%part, %y), window={size=64 stride=63 lhs_dilate=64}, \
dim_labels=0bf_0oi->0bf
}

%write.part (x: f32[16,128], y: f32[2,128], i: s32[]) -> (f32[16,128], f32[2,128]) {
  %x = f32[16,128]{1,0} parameter(0)
  %y = f32[2,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %twice = f32[2,128]{1,0} add(%y, %y)
  %new = f32[16,128]{1,0} dynamic-update-slice(%x, %twice, %i, %i)
  ROOT %both = (f32[16,128]{1,0}, f32[2,128]{1,0}) tuple(%new, %twice)
}

%fresh.part (y: f32[2,128], i: s32[]) -> f32[16,128] {
  %y = f32[2,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = f32[] constant(0)
  %zeros = f32[16,128]{1,0} broadcast(%zero), dimensions={}
  ROOT %new = f32[16,128]{1,0} dynamic-update-slice(%zeros, %y, %i, %i)
}

%gathering (x: f32[1000,128], i: s32[8,1]) -> f32[8,128] {
  %x = f32[1000,128]{1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  ROOT %g = f32[8,128]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,128}
}

%on.sparsecore (x: f32[1000,128], i: s32[8,1]) -> f32[8,128] {
  %x = f32[1000,128]{1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  ROOT %f = f32[8,128]{1,0} fusion(%x, %i), kind=kCustom, calls=%gathering
}

ENTRY %main (a: f32[16,32]) -> f32[] {
  %a = f32[16,32]{1,0} parameter(0)
  %b = f32[32,8]{1,0:S(1)} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %big = bf16[64,4096,192]{2,1,0} parameter(3)
  %keys = bf16[64,256,192]{2,1,0:S(1)} parameter(4)
  %state = f32[16,128]{1,0} parameter(5)
  %part = f32[2,128]{1,0} parameter(6)
  %table = f32[1000,128]{1,0} parameter(7)
  %rows = s32[8,1]{1,0} parameter(8)
  %dot = f32[16,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %logits = f32[64,256,256]{2,1,0:S(1)} fusion(%big, %i, %keys), kind=kOutput, calls=%read.part
  %updated = (f32[16,128]{1,0}, f32[2,128]{1,0:S(1)}) fusion(%state, %part, %i), kind=kLoop, calls=%write.part
  %fresh = f32[16,128]{1,0} fusion(%part, %i), kind=kLoop, calls=%fresh.part
  %gathered = f32[8,128]{1,0} gather(%table, %rows), offset_dims={1}, slice_sizes={1,128}
  %start = ((), (), (s32[32]{0})) custom-call-start(), called_computations={%on.sparsecore}
  %update = ((f32[1000,128]{1,0}), f32[8,128]{1,0}, s32[32]{0}) custom-call-update(%start, %table, %rows)
  %done = f32[8,128]{1,0} custom-call-done(%update)
  %fetch = (f32[16,32]{1,0:S(1)}, f32[16,32]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %fetched = f32[16,32]{1,0:S(1)} copy-done(%fetch)
  %cut = ((f32[16,32]{1,0}), f32[4,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:32]}
  %copy = f32[16,32]{1,0} copy(%a)
  %sum = f32[16,32]{1,0} add(%a, %a)
  %room = bf16[4,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %set = f32[16,128]{1,0} dynamic-update-slice(%state, %part, %i, %i)
  %seen = f32[2,128]{1,0} dynamic-slice(%state, %i, %i), dynamic_slice_sizes={2,128}
  ROOT %view = f32[512]{0} bitcast(%a)
}
"""


@pytest.mark.parametrize(
    ("name", "flops", "moved"),
    [
        ("dot", 2 * 16 * 32 * 8, 4 * (16 * 32 + 16 * 8)),  # b stands in VMEM
        # a slice two fusions deep; the batch dim of the matmul is a window that meets one entry; the rest is in VMEM
        ("logits", 2 * 64 * 256 * 256 * 192, 2 * 64 * 256 * 192),
        ("updated", 0, 2 * 4 * 2 * 128),  # in place: reads and writes the part; its copy stays in VMEM
        ("fresh", 0, 4 * (2 * 128 + 16 * 128)),  # not in place: all of it is new
        ("gathered", 0, 2 * 4 * 8 * 128),
        ("start", 0, 2 * 4 * 8 * 128 + 4 * 8),  # and the numbers of its rows
        ("update", 0, 0),
        ("done", 0, 0),
        ("fetch", 0, 4 * 16 * 32),  # from memory to VMEM
        ("fetched", 0, 0),
        ("cut", 0, 4 * 4 * 32),
        ("copy", 0, 2 * 4 * 16 * 32),
        ("sum", 0, 2 * 4 * 16 * 32),  # one operand, twice
        ("room", 0, 0),
        ("set", 0, 2 * 4 * 2 * 128),
        ("seen", 0, 2 * 4 * 2 * 128),
        ("view", 0, 0),
    ],
)
def test_closed_forms(name, flops, moved):
    module = parse(MODULE)
    main = module.computations["main"]
    assert Costs(module).work(main, main.by_name[name]) == (flops, moved)


def convolution(size, stride, low, high, left, right):
    """A convolution of 7 entries with a window, as HLO; and the number of pairs that meet, entry by entry."""
    reach = (7 - 1) * left + 1
    window = (size - 1) * right + 1
    count = (reach + low + high - window) // stride + 1
    pairs = sum(
        o * stride + k * right == low + i * left for o, k, i in itertools.product(range(count), range(size), range(7))
    )
    text = f"""\
ENTRY %main (x: f32[3,7,4], k: f32[4,{size},5]) -> f32[3,{count},5] {{
  %x = f32[3,7,4]{{2,1,0}} parameter(0)
  %k = f32[4,{size},5]{{2,1,0}} parameter(1)
  ROOT %c = f32[3,{count},5]{{2,1,0}} convolution(%x, %k), window={{size={size} stride={stride} pad={low}_{high} \
lhs_dilate={left} rhs_dilate={right}}}, dim_labels=b0f_i0o->b0f
}}
"""
    return text, 2 * 3 * pairs * 4 * 5


@pytest.mark.parametrize("shape", [(3, 1, 0, 0, 1, 1), (3, 2, 1, 1, 1, 1), (2, 1, 1, 0, 3, 1), (3, 2, 2, 3, 2, 2)])
def test_convolutions(shape):
    text, flops = convolution(*shape)
    module = parse(text)
    assert Costs(module).flops(module.computations["main"], module.computations["main"].root) == flops > 0


def test_convolution_by_groups():
    """Four groups of the input's features: each output feature meets two of the eight."""
    text = """\
ENTRY %main (x: f32[3,8], k: f32[2,12]) -> f32[3,12] {
  %x = f32[3,8]{1,0} parameter(0)
  %k = f32[2,12]{1,0} parameter(1)
  ROOT %c = f32[3,12]{1,0} convolution(%x, %k), dim_labels=bf_io->bf, feature_group_count=4
}
"""
    module = parse(text)
    assert Costs(module).flops(module.computations["main"], module.computations["main"].root) == 2 * 3 * 2 * 12


def played_flops(function, *shapes):
    """Of the program that this machine's compiler makes, without its matmul libraries, with all turns of its loops."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(function).lower(*inputs).compile().as_text()
    module = parse(text)
    network = Network(Chip(1e12, 1e12, 1e9), {}, {}, {"fsdp": 1})
    return Schedule(module, Costs(module).work, network, Loops(module).turns).play().work.flops


def test_compiled_matmuls():
    assert played_flops(lambda a, b: jnp.tanh(a @ b), (24, 40), (40, 56)) == 2 * 24 * 40 * 56
    batched = played_flops(lambda a, b: jnp.einsum("bhqk,bhzk->bhqz", a, b), (2, 3, 24, 40), (2, 3, 56, 40))
    assert batched == 2 * 2 * 3 * 24 * 40 * 56


def test_compiled_scan_and_its_gradient():
    """Seven layers forward; backward each has two matmuls, for the weights and for the activations."""

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2)

    one = 2 * 16 * 32 * 32
    assert played_flops(loss, (7, 32, 32), (16, 32)) == 7 * one
    assert played_flops(jax.grad(loss, (0, 1)), (7, 32, 32), (16, 32)) == 3 * 7 * one


def test_bytes_of_a_compiled_sum():
    """A fusion reads two arrays and writes one."""
    x = jax.ShapeDtypeStruct((64, 64), np.float32)
    module = parse(jax.jit(lambda a, b: jnp.tanh(a) + b).lower(x, x).compile().as_text())
    main = module.computations[module.entry]
    costs = Costs(module)
    assert sum(costs.work(main, one).hbm_bytes for one in main.instructions) == 3 * 4 * 64 * 64
