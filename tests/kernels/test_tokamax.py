"""tokamax's kernels, those for TPUs interpreted on a CPU: `make test-kernels`."""

import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.config import Config, DataConfig, KernelsConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from k2jax.errors import UserError
from k2jax.kernels import tokamax_attention
from k2jax.kernels.chunked_attention import TokenIndex
from k2jax.kernels.grouped_matmul import grouped_matmul
from k2jax.kernels.tokamax import kernel_problem, load_tokamax
from k2jax.kernels.tokamax_attention import library_attention
from k2jax.model import attention as model_attention
from k2jax.model.mla import keys_and_values
from k2jax.sharding.mesh import make_mesh
from k2jax.sharding.rules import spec
from k2jax.train.batch import Batch
from k2jax.train.optimizer import make_optimizer
from k2jax.train.state import init_state
from k2jax.train.step import make_train_step

ROWS, GROUPS, WIDTH = 256, 4, 128  # the least that the kernel's tiles take
SIZES = {"random": [100, 0, 56, 100], "rows_past_the_sum": [30, 90, 0, 60], "all_in_one": [0, 0, 256, 0]}


@pytest.fixture
def interpreted(use_v5p_ragged_dot):
    use_v5p_ragged_dot(interpret=True)


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")  # of tokamax, about itself
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernel_agrees_with_a_loop(interpreted, sizes):
    """Values and gradients of two weights at once, to the rounding of float32 sums."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(ROWS, 2 * WIDTH))
    w = rng.normal(size=(2, GROUPS, WIDTH, WIDTH))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros((GROUPS, WIDTH, 2 * WIDTH))
    both = np.concatenate(w, -1)
    for row, group in enumerate(np.repeat(np.arange(GROUPS), sizes)):
        y[row], dx[row] = x[row] @ both[group], both[group] @ dy[row]
        dw[group] += np.outer(x[row], dy[row])
    x, dy, w = (a.astype(np.float32) for a in (x, dy, w))
    run = lambda x, *w: grouped_matmul(x, w, np.array(sizes, np.int32), "tokamax")  # noqa: E731
    got_y, pull = jax.vjp(run, x, *w)
    got_dx, *got_dw = pull(dy)
    for got, want in ((got_y, y), (got_dx, dx), (np.concatenate(got_dw, -1), dw)):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")
def test_kernel_in_shard_map(interpreted):
    """Rows cut over a mesh axis, weights shared by it: values, and gradients summed over it, are those of no mesh."""
    rng = np.random.default_rng(0)
    x, dy = jnp.asarray(rng.normal(size=(2, 2 * ROWS, WIDTH)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(GROUPS, WIDTH, WIDTH)), jnp.float32)
    sizes = jnp.asarray([SIZES["random"]] * 2, jnp.int32)

    def layer(x, w, sizes):
        return grouped_matmul(x, (jax.lax.pcast(w, "fsdp", to="varying"),), sizes[0], "tokamax")

    with jax.set_mesh(jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Explicit,))):
        put = jax.device_put((x, w, sizes), (P("fsdp"), P(), P("fsdp")))
        cut = jax.shard_map(layer, in_specs=(P("fsdp"), P(), P("fsdp")), out_specs=P("fsdp"))
        y, pull = jax.vjp(lambda x, w: cut(x, w, put[2]), *put[:2])
        got = jax.device_get((y, *pull(jax.device_put(dy, P("fsdp")))))
    want = [jax.vjp(lambda x, w: grouped_matmul(x, (w,), sizes[0], "blocked"), a, w) for a in jnp.split(x, 2)]
    gradients = [pull(d) for (_, pull), d in zip(want, jnp.split(dy, 2), strict=True)]
    dx, dw = zip(*gradients, strict=True)
    for a, b in zip(got, (np.concatenate([y for y, _ in want]), np.concatenate(dx), sum(dw)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6 * np.abs(b).max())


@pytest.fixture
def on_this_cpu(monkeypatch, request):
    """`library_attention` by the TPU's kernel, interpreted, or by what stands for the GPU's: tokamax's own reference."""
    if request.param == "tpu":
        return partial(library_attention, interpret=True)
    load_tokamax("attention")
    from tokamax._src.ops.attention import api, base

    monkeypatch.setattr(api, "IMPLEMENTATIONS", {"triton": base.DotProductAttention()})
    return library_attention


def attention_values(sequences, length=256, heads=2, nope=128, rope=64, value=128, latent=16):
    """Latents, rotary keys, weights that make K2's keys and values of them, queries, and packed documents."""
    rng = np.random.default_rng(0)
    shapes = [(sequences, heads, length, nope + rope), (sequences, length, latent), (sequences, length, rope),
              (latent, heads, nope), (latent, heads, value), (sequences, heads, length, value)]  # fmt: skip
    values = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (sequences, length))
    segment = jnp.asarray(np.sort(rng.integers(0, 3, (sequences, length)), 1), jnp.int32)
    return values, TokenIndex(index, segment)


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("on_this_cpu", ["tpu", "gpu"], indirect=True)
@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 2)], ids=["one_device", "fsdp2_tensor2"])
def test_attention_agrees_with_chunks(on_this_cpu, mesh_shape, monkeypatch):
    """Output, largest logits and all gradients of documents in rows, as `model/attention.py` calls it, on a mesh too."""
    (q, latent, rope, key, value, dout), at = attention_values(2)
    monkeypatch.setattr(model_attention, "library_attention", on_this_cpu)
    mesh = make_mesh(
        MeshConfig(fsdp=mesh_shape[0], tensor=mesh_shape[1]), jax.devices()[: mesh_shape[0] * mesh_shape[1]]
    )

    def run(kernels):
        def layer(q, latent, rope, key, value):
            sources, weights = (latent, rope), (key, value)
            return model_attention.attention(q, sources, weights, keys_and_values, q_at, k_at, 0.07, kernels)

        dims = "BHSK", "BT", "BT", "CHN", "CHN"
        with jax.set_mesh(mesh):
            put = jax.device_put((q, latent, rope, key, value), tuple(jax.NamedSharding(mesh, spec(d)) for d in dims))
            q_at, k_at = (
                TokenIndex(*jax.device_put(tuple(at), jax.NamedSharding(mesh, spec(d)))) for d in ("BS", "BZ")
            )
            dout_here = jax.device_put(dout, jax.NamedSharding(mesh, spec("BHSU")))

            @jax.jit
            def both_passes(dout, *values):
                out, pull, largest = jax.vjp(layer, *values, has_aux=True)
                return out, largest, *pull(dout)

            return jax.device_get(both_passes(dout_here, *put))

    for got, want in zip(run(KernelsConfig(attention="tokamax")), run(KernelsConfig()), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")
def test_splash_in_bfloat16_has_no_bias():
    """Largest logits against float64's: rounded, but on the mean neither larger nor smaller by 3e-4."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(3 * rng.normal(size=(2, 2, 256, dim)), jnp.bfloat16) for dim in (192, 192, 128))
    segment = np.sort(rng.integers(0, 3, (2, 256), np.int32), 1)
    _, got = library_attention(q, k, v, jnp.asarray(segment), 0.07, "tpu", interpret=True)
    logits = 0.07 * np.einsum("BHSK,BHZK->BHSZ", np.float64(q), np.float64(k))
    seen = np.tril(segment[:, :, None] == segment[:, None])[:, None]
    want = np.where(seen, logits, -np.inf).max(-1)
    assert abs((np.float64(got) * want).sum() / (want * want).sum() - 1) < 3e-4


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("axes", "remat"),
    [({"fsdp": 2, "expert": 2, "tensor": 2}, "k2"), ({"stage": 2, "fsdp": 2}, "layer")],
    ids=["mesh", "pipeline"],
)
def test_step_agrees_with_chunks(monkeypatch, axes, remat):
    """Two whole training steps by splash, interpreted, and by chunks: the same loss, gradient norm and largest logits."""
    monkeypatch.setattr(model_attention, "library_attention", partial(library_attention, interpret=True))
    tokens = np.random.default_rng(0).integers(64, size=(2, 4, 256), dtype=np.int32)
    place = np.broadcast_to(np.arange(256, dtype=np.int32) % 100, tokens.shape)
    document = np.broadcast_to(np.arange(256, dtype=np.int32) // 100, tokens.shape)
    model = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=5, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, intermediate_size=64, moe_intermediate_size=16,
        n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip

    def run(attention):
        config = Config(
            model=model, mesh=MeshConfig(**axes), kernels=KernelsConfig(attention=attention),
            optim=OptimConfig(ns_dtype="float32"), data=DataConfig(sequence_length=256, batch_sequences=8),
            train=TrainConfig(num_microbatches=2, compute_dtype="float32", remat=remat),
        ).validate()  # fmt: skip
        mesh = make_mesh(config.mesh, jax.devices()[: np.prod([*axes.values()])])
        with jax.set_mesh(mesh):
            tx = make_optimizer(config, mesh)
            state, step = init_state(config, tx), jax.jit(make_train_step(config, tx))
            put = jax.device_put(Batch(tokens, tokens, place, document), jax.NamedSharding(mesh, spec("MBT")))
            state, _ = step(state, put)
            return jax.device_get(step(state, put)[1])

    got, want = run("tokamax"), run("chunked")
    for name in ("loss", "grad_norm", "max_logits"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("field", ["grouped_matmul", "attention"])
def test_without_tokamax_it_says_what_to_do(monkeypatch, field):
    monkeypatch.setitem(__import__("sys").modules, "tokamax", None)
    with pytest.raises(UserError, match=f"kernels.{field} as 'tokamax'.*needs tokamax: pip install .*docs/experts.md"):
        if field == "attention":
            library_attention(*np.zeros((3, 1, 1, 128, 8), np.float32), np.zeros((1, 128), np.int32), 1.0, "tpu")
        else:
            x, w = np.zeros((8, 4), np.float32), np.zeros((1, 4, 4), np.float32)
            grouped_matmul(x, (w,), np.array([8], np.int32), "tokamax")


def no_such_keyword(x, sizes):
    raise TypeError("Mesh.__init__() got an unexpected keyword argument 'out_shape'\nand more")


def test_a_kernel_that_this_jax_does_not_run():
    """Found by tracing it once, forward and backward, wherever that is asked: within a mesh's program too."""
    arguments = ((8, 8), jnp.bfloat16), ((4,), jnp.int32)
    assert kernel_problem(lambda x, sizes: jnp.sin(x) * sizes.sum(), *arguments) is None
    problem = kernel_problem(no_such_keyword, *arguments)
    assert problem.endswith("here (TypeError: Mesh.__init__() got an unexpected keyword argument 'out_shape')")
    assert f"does not work with jax {jax.__version__}" in problem
    no_gradient = jax.custom_vjp(lambda x, sizes: x)
    assert "AttributeError" in kernel_problem(no_gradient, *arguments)
    seen = []

    def local(x):
        seen.append(kernel_problem(lambda x, sizes: jnp.sin(x), *arguments))
        return x

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        jax.jit(jax.shard_map(local, in_specs=P("fsdp"), out_specs=P("fsdp"))).trace(
            jax.device_put(jnp.zeros(2), P("fsdp"))
        )
    assert seen == [None]


def test_attention_without_a_kernel_that_works(monkeypatch):
    """One message for the user, with what each kernel says, whatever it raises."""

    def refuses(*arguments, **options):
        raise NotImplementedError("head dim 24")

    attention = types.ModuleType("tokamax._src.ops.attention")
    implementations = {"mosaic_gpu": lambda *_, **__: no_such_keyword(None, None), "triton": refuses}
    attention.api = types.SimpleNamespace(IMPLEMENTATIONS=implementations)
    attention.base = types.SimpleNamespace(Mask=lambda **options: None)
    monkeypatch.setitem(sys.modules, attention.__name__, attention)
    for name in ("tokamax", "tokamax._src", "tokamax._src.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(tokamax_attention, "load_tokamax", lambda field: None)
    q = jnp.zeros((1, 2, 128, 24))
    with pytest.raises(UserError) as error:
        library_attention(q, q, q, jnp.zeros((1, 128), jnp.int32), 1.0, "gpu")
    (message,) = error.value.problems
    assert message.startswith("kernels.attention = 'tokamax': tokamax has none that works with jax ")
    assert "mosaic_gpu: TypeError: Mesh.__init__()" in message and "triton: NotImplementedError: head dim 24" in message
