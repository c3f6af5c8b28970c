"""Copies of the state that devices have of the same part, compared bit by bit: one that differs is silent corruption.

A mesh repeats much of a state: over `replica` all of it, over `tensor` or `expert` the norms and the router. The copies
are computed alike and have to be alike; a device whose memory or arithmetic is at fault shows nowhere else.
"""

import hashlib
from collections import Counter

import jax
import numpy as np

from k2jax.errors import RunFailed
from k2jax.processes import gather, index
from k2jax.train.content import differing_copies, name_of, stack_of


def _own_copies(leaf: jax.Array) -> list[tuple[str, str, str]]:
    """(which part, device, sha256) of each part of an array that this process's devices have."""
    return [
        (str(shard.index), f"{shard.device.platform}:{shard.device.id} of process {index()}",
         hashlib.sha256(np.asarray(jax.device_get(shard.data)).tobytes()).hexdigest())
        for shard in leaf.addressable_shards
    ]  # fmt: skip


def _minority(copies: list[tuple[str, str, str]]) -> list[str]:
    """Devices whose copy is not that of most others; where no copy has most, all devices of that part."""
    wrong = []
    for part in dict.fromkeys(part for part, _, _ in copies):
        digests = Counter(digest for other, _, digest in copies if other == part)
        (most, count), *rest = digests.most_common()
        tied = bool(rest) and rest[0][1] == count
        wrong += [device for other, device, digest in copies if other == part and len(digests) > 1 and (tied or digest != most)]
    return wrong


def check_copies(tree, step: int) -> None:
    """RunFailed with every array whose copies differ, and the devices that have another than most. In all processes at once."""
    differ, at, problems = differing_copies(tree), 0, []
    if not differ.any():
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = int(np.prod(stack_of(leaf.shape), dtype=int))
        if differ[at : at + size].any():
            copies = [tuple(copy) for part in gather("copies", _own_copies(leaf)) for copy in part]
            problems.append(f"{name_of(path)} on {', '.join(dict.fromkeys(_minority(copies)))}")
        at += size
    rule = "the memory or arithmetic of a device is at fault, and nothing is saved; exclude its host and resume"
    raise RunFailed(f"after step {step} copies of the state differ: {'; '.join(problems[:8])}: {rule}")
