"""Digests of content: the same on every mesh, another for every changed bit, and the changed place is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.train.content import content_problems, content_sums, named_digests

RNG = np.random.default_rng(5)
VALUES = {
    "experts": RNG.standard_normal((3, 4, 128, 128)).astype(np.float32),
    "half": RNG.standard_normal((2, 96, 256)).astype(jnp.bfloat16),
    "count": np.int32(7),
    "bias": RNG.standard_normal(24).astype(np.float32),
    "flags": np.array([1, 0, 1, 1, 0, 0, 1, 0], np.uint8),
}
LAYOUTS = {
    "one device": ({}, {}),
    "fsdp 2 expert 2 tensor 2": (
        {"fsdp": 2, "expert": 2, "tensor": 2},
        {"experts": (None, "expert", "fsdp", "tensor"), "half": (None, ("fsdp", "tensor")), "bias": ("expert",)},
    ),
    "stage 3, most devices idle": ({"stage": 3}, {"experts": ("stage",)}),
    "replica 2 context 4": ({"replica": 2, "context": 4}, {"experts": (None, None, "context"), "bias": (("replica", "context"),)}),
    "expert 4 fsdp 2": ({"expert": 4, "fsdp": 2}, {"experts": (None, ("expert",), "fsdp"), "half": ("fsdp", "expert")}),
}


def laid_out(mesh_of, name: str, values=VALUES) -> dict:
    sizes, specs = LAYOUTS[name]
    mesh = mesh_of(**sizes)
    return {key: jax.device_put(v, jax.NamedSharding(mesh, jax.P(*specs.get(key, ())))) for key, v in values.items()}


def digests(tree) -> dict[str, str]:
    return named_digests(tree, np.asarray(content_sums(tree)))


def reference(values) -> dict[str, str]:
    """In plain Python integers, element by element, from the words of content.py's docstring."""
    odd = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)

    def mix(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    found = {}
    for name, value in sorted(values.items()):
        bits = value.view(f"uint{8 * value.dtype.itemsize}")
        sums = [0, 0]
        for place in np.ndindex(value.shape):
            at, row = (sum(i * factor for i, factor in zip(index, odd)) % 2**32 for index in (place, place[:-1]))
            mixed = mix((int(bits[place]) + mix(at)) % 2**32)
            sums = [(sums[0] + mixed) % 2**32, (sums[1] + mixed * (row | 1)) % 2**32]
        found[name] = f"{sums[0]:08x}{sums[1]:08x}"
    return found


def test_the_same_on_every_mesh(mesh_of):
    expected = digests({key: jnp.asarray(value) for key, value in VALUES.items()})
    assert {name: len(text) for name, text in expected.items()} == {"bias": 16, "count": 16, "experts": 192, "flags": 16, "half": 32}
    for name in LAYOUTS:
        assert digests(laid_out(mesh_of, name)) == expected, name
    small = {name: VALUES[name] for name in ("bias", "count", "flags")} | {"half": VALUES["half"][1]}
    expected = expected | {"half": digests({"half": jnp.asarray(VALUES["half"][1])})["half"]}
    assert reference(small) == {name: expected[name] for name in small}
    assert json.loads(json.dumps(expected)) == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_changed_place_is_named(mesh_of, name):
    expected = digests(laid_out(mesh_of, name))
    changed = {key: value.copy() for key, value in VALUES.items()}
    changed["experts"].view(np.uint32)[2, 1, 5, 7] ^= 1 << 31
    changed["experts"].view(np.uint32)[2, 1, 5, 8] ^= 1 << 31  # two flipped signs
    changed["bias"][[3, 4]] = changed["bias"][[4, 3]]
    assert content_problems(laid_out(mesh_of, name), expected) == []
    assert content_problems(laid_out(mesh_of, name, changed), expected) == [
        "bias: is not what was saved, in 1 of 1 parts",
        "experts[2, 1]: is not what was saved, in 1 of 12 parts",
    ]
    assert len(content_problems(laid_out(mesh_of, name), {})) == len(VALUES)


def test_no_flip_is_missed():
    """400 single bits, 400 pairs of signs, 400 exchanged pairs; the weighted sum of the bits would miss every pair of signs."""
    value, rng = VALUES["half"][:, :32, :64], np.random.default_rng(6)
    expected = digests({"half": jnp.asarray(value)})
    for kind in ("bit", "signs", "exchange"):
        for _ in range(400):
            changed = value.copy()
            bits = changed.view(np.uint16).reshape(-1)
            a, b = rng.choice(bits.size, 2, replace=False)
            if kind == "bit":
                bits[a] ^= 1 << int(rng.integers(16))
            elif kind == "signs":
                bits[[a, b]] ^= 1 << 15
            else:
                if bits[a] == bits[b]:
                    continue
                bits[[a, b]] = bits[[b, a]]
            assert digests({"half": jnp.asarray(changed)}) != expected, (kind, a, b)


def test_eight_byte_dtypes_are_refused():
    with jax.enable_x64(True), pytest.raises(TypeError, match="a state of float64: digests are of at most 4 bytes"):
        content_sums({"x": jnp.zeros(3, jnp.float64)})


@pytest.mark.parametrize("number", [0, 3, 7])
def test_every_copy_is_proved_and_not_one_alone(mesh_of, number):
    """As when one process of several that read the same file reads it wrong."""
    expected = digests(laid_out(mesh_of, "one device"))
    tree = laid_out(mesh_of, "replica 2 context 4")
    assert content_problems(tree, expected) == []
    for name, place in {"experts": (2, 1, 0, 5), "half": (1, 3, 7), "count": ()}.items():
        array = tree[name]
        pieces = [np.array(shard.data) for shard in array.addressable_shards]
        pieces[number][place] += 1
        devices = [shard.device for shard in array.addressable_shards]
        changed = jax.make_array_from_single_device_arrays(array.shape, array.sharding, jax.device_put(pieces, devices))
        (problem,) = content_problems(tree | {name: changed}, expected)
        places = {"experts": "experts[2, 1]: is not what was saved, in 1 of 12 parts",
                  "half": "half[1]: is not what was saved, in 1 of 2 parts",
                  "count": "count: is not what was saved, in 1 of 1 parts"}  # fmt: skip
        assert problem == places[name]
