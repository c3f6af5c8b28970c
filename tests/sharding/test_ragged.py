"""The ragged transport, whose collective XLA has on TPU and GPU alone: with a NumPy emulation of that collective.

The emulation is the pseudo-code of `jax.lax.ragged_all_to_all`'s documentation; everything else, the plan, both
permutations and the gradients, is what runs on an accelerator. tests/sharding/test_tpu_exchange.py compiles that.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_exchange import NUM_CHOICES, NUM_EXPERTS, NUM_TOKENS, ROUTINGS, check, kept_choices

from k2jax.sharding import transports


def receive(here, operand_SND, output_MD, start_SK, size_SK, place_SK, received_K):
    """Rows of shard `here` after the exchange. AssertionError if sender and receiver disagree."""
    num_shards, result = len(operand_SND), np.array(output_MD)
    written = np.zeros(len(result), bool)
    per_shard = start_SK.shape[1] // num_shards
    for sender, k in np.ndindex(num_shards, per_shard):
        mine = sender, here * per_shard + k
        first, size, place = start_SK[mine], size_SK[mine], place_SK[mine]
        assert size == received_K[sender * per_shard + k]
        assert 0 <= place and place + size <= len(result) and first + size <= operand_SND.shape[1]
        assert not written[place : place + size].any()
        written[place : place + size] = True
        result[place : place + size] = operand_SND[sender, first : first + size]
    return result


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` by gathering everything everywhere."""
    gather = partial(lax.all_gather, axis_name=axis_name)
    # as bits: a callback's thread knows nothing of enable_x64 and would make float32 of float64
    dtype, bits = output.dtype, partial(lax.bitcast_convert_type, new_dtype=jnp.uint32)
    operand, output = bits(operand), bits(output)
    arguments = gather(operand), output, *map(gather, (input_offsets, send_sizes, output_offsets)), recv_sizes
    shape = jax.ShapeDtypeStruct(output.shape, output.dtype)
    received = jax.pure_callback(
        lambda here, *a: receive(int(here), *map(np.asarray, a)), shape, lax.axis_index(axis_name), *arguments
    )
    return lax.pcast(lax.bitcast_convert_type(received, dtype), axis_name, to="varying")


def zipf_choices():
    rng = np.random.default_rng(2)
    score = np.log(1 / np.arange(1, NUM_EXPERTS + 1)) + rng.gumbel(size=(NUM_TOKENS, NUM_EXPERTS))
    return np.argsort(-score, 1)[:, :NUM_CHOICES].astype(np.int32)


def without_some_experts():
    rng = np.random.default_rng(3)
    return np.stack([rng.permutation([0, 3, 4, 6])[:NUM_CHOICES] for _ in range(NUM_TOKENS)]).astype(np.int32)


MORE = ROUTINGS | {"zipf": zipf_choices(), "empty_experts": without_some_experts()}


CASES = [(2, None, "all_to_the_first_experts"), *((4, None, routing) for routing in MORE)]


@pytest.mark.parametrize(("num_shards", "buffer", "routing"), [*CASES, (4, 1.25, "random"), (4, 1.25, "zipf")])
def test_value_loads_drops_and_gradients(mesh_of, monkeypatch, num_shards, buffer, routing):
    """Those of a loop over tokens, as the other transports' are; sizes agree and no row is written twice.

    What no row is written to is NaN, which must reach no result.
    """
    monkeypatch.setattr(transports.lax, "ragged_all_to_all", emulated)
    unwritten = transports.unwritten
    monkeypatch.setattr(transports, "unwritten", lambda x, num_rows: unwritten(x, num_rows) + jnp.nan)
    kept = None if buffer is None else kept_choices(MORE[routing], num_shards, buffer)
    check(mesh_of(expert=num_shards), MORE[routing], "ragged", buffer, kept)


def test_the_emulation_is_the_documented_one():
    """The example of the documentation: two shards, one slice each way."""
    operand = np.array([[1, 2, 2], [3, 4, 0]])[..., None]
    start, size, place = np.array([[0, 1], [0, 1]]), np.array([[1, 2], [1, 1]]), np.array([[0, 0], [1, 2]])
    got = [receive(h, operand, np.zeros((4, 1), int), start, size, place, [[1, 1], [2, 1]][h]) for h in (0, 1)]
    assert [g[:, 0].tolist() for g in got] == [[1, 3, 0, 0], [2, 2, 4, 0]]


def test_a_cpu_has_no_such_collective(mesh_of):
    """Why it is emulated here; the day this fails, the test above can run the real one."""
    mesh = mesh_of(expert=2)
    with jax.set_mesh(mesh), pytest.raises(Exception, match="UNIMPLEMENTED.*ragged"):
        check(mesh, ROUTINGS["random"], "ragged", None, None)


def test_rows_stand_by_expert_then_sender_then_token():
    """The plan alone, on host arrays: where every kept choice of every sender lands at its owner, and comes back."""
    num_shards, per_shard = 4, NUM_EXPERTS // 4
    expert_STA = MORE["zipf"].reshape(num_shards, -1, NUM_CHOICES)
    count = np.stack([np.bincount(e.ravel(), minlength=NUM_EXPERTS) for e in expert_STA])
    count = jnp.asarray(count.reshape(num_shards, num_shards, per_shard), jnp.int32)
    route = partial(transports.Route, "expert", order_M=None, rank_TA=None, expert_TA=None)
    plans = [
        transports.ragged_slices(route(here=h, count_SPE=count, kept_SPE=count, room=1000)) for h in range(num_shards)
    ]
    sent = [sorted((e, h, t) for t, row in enumerate(expert_STA[h]) for e in row) for h in range(num_shards)]
    num_sent = len(sent[0])
    operand = np.array(sent)
    fields = [np.stack([np.asarray(getattr(out, f)) for out, _ in plans]) for f in ("start", "size", "place")]
    owned = [
        receive(h, operand, np.full((1000, 3), -1), *fields, np.asarray(plans[h][0].received))
        for h in range(num_shards)
    ]
    for h, rows in enumerate(owned):
        mine = [row for row in np.concatenate(operand).tolist() if row[0] // per_shard == h]
        assert rows[: len(mine)].tolist() == sorted(mine) and (rows[len(mine) :] == -1).all()
    fields = [np.stack([np.asarray(getattr(back, f)) for _, back in plans]) for f in ("start", "size", "place")]
    for h in range(num_shards):
        back = receive(h, np.stack(owned), np.full((num_sent, 3), -1), *fields, np.asarray(plans[h][1].received))
        assert back.tolist() == [list(row) for row in sent[h]]
