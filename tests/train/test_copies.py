"""One flipped bit in one device's copy of a state is found, and the device named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.errors import RunFailed
from k2jax.train.copies import check_copies

SPECS = {"matrix": jax.P("fsdp", "tensor"), "norm": jax.P(), "router": jax.P(None, "expert"), "half": jax.P("fsdp")}


def state(mesh, flip: str | None = None, device: int = 0) -> dict:
    """Arrays on eight devices; in one copy of one of them the lowest bit of the first element is another."""
    rng, found = np.random.default_rng(3), {}
    for name, spec in SPECS.items():
        value = rng.standard_normal((8, 16)).astype(jnp.bfloat16 if name == "half" else np.float32)
        array = jax.device_put(value, jax.NamedSharding(mesh, spec))
        if name == flip:
            shards = [np.array(shard.data) for shard in array.addressable_shards]
            number = next(i for i, shard in enumerate(array.addressable_shards) if shard.device.id == device)
            shards[number].reshape(-1)[:1].view(np.uint16 if name == "half" else np.uint32)[0] ^= 1
            parts = [jax.device_put(part, shard.device) for part, shard in zip(shards, array.addressable_shards, strict=True)]
            array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
        found[name] = array
    return found


def test_equal_copies_pass(mesh_of):
    check_copies(state(mesh_of(fsdp=2, expert=2, tensor=2)), 5)
    check_copies(state(mesh_of(replica=8)), 5)


@pytest.mark.parametrize("device", [0, 5])
def test_of_many_copies_the_odd_one_is_named(mesh_of, device):
    with pytest.raises(RunFailed) as caught:
        check_copies(state(mesh_of(fsdp=2, expert=2, tensor=2), "norm", device), 5)
    assert str(caught.value).startswith(f"after step 5 copies of the state differ: norm on cpu:{device} of process 0: ")


def test_of_two_copies_both_are_named(mesh_of):
    """matrix is cut over fsdp and tensor, so only two devices, along expert, have the same part."""
    with pytest.raises(RunFailed, match=r"differ: matrix on cpu:\d of process 0, cpu:\d of process 0: "):
        check_copies(state(mesh_of(fsdp=2, expert=2, tensor=2), "matrix", 3), 5)


def test_two_byte_elements_and_a_mesh_of_replicas(mesh_of):
    with pytest.raises(RunFailed, match="differ: half on cpu:6 of process 0: "):
        check_copies(state(mesh_of(replica=8), "half", 6), 5)


def test_an_array_without_copies_cannot_tell(mesh_of):
    check_copies({"a": state(mesh_of(fsdp=2, tensor=4), "matrix", 3)["matrix"]}, 5)
