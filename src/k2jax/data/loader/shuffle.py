"""A keyed shuffle of range(size) that computes any element alone: no table, no state, the same on every platform."""

import math

import numpy as np

from k2jax.data.splitmix import MASK, mix

_ROUNDS = 8
MAX_SIZE = 2**62


def _round_keys(key: int) -> list[int]:
    return [mix((key + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i in range(_ROUNDS)]


def _feistel(x, radix: int, keys: list[int]):
    """A bijection of range(radix**2): each round adds, modulo radix, a function of one digit to the other.

    x is an int or a uint64 array: both take the same operators, and `& MASK` gives ints the wrap-around.
    """
    high, low = x // radix, x % radix
    for key in keys:
        high, low = low, (high + mix((low + key) & MASK) % radix) % radix
    return high * radix + low


def _unfeistel(x: int, radix: int, keys: list[int]) -> int:
    """The inverse of `_feistel`: the same rounds, the last one first, with the digits changing sides."""
    high, low = divmod(x, radix)
    for key in reversed(keys):
        high, low = (low - mix((high + key) & MASK) % radix) % radix, high
    return high * radix + low


def _permute_array(index: np.ndarray, size: int, radix: int, keys: list[int]) -> np.ndarray:
    result = _feistel(index.astype(np.uint64).ravel(), radix, keys)
    (outside,) = np.nonzero(result >= size)
    while outside.size:  # walk along the cycle until back in range(size); at most 2 sqrt(size) + 1 values are outside
        result[outside] = _feistel(result[outside], radix, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(index.shape)


def _permute_int(index: int, size: int, radix: int, keys: list[int]) -> int:
    index = _feistel(index, radix, keys)
    while index >= size:
        index = _feistel(index, radix, keys)
    return index


def permute(index: np.ndarray | int, size: int, key: int) -> np.ndarray | int:
    """The place of element `index` of range(size) under the shuffle named by the 64-bit `key`.

    index: an int (gives an int), or integers of any shape (gives int64). ValueError outside range(size) or for
    sizes outside 1..2**62. Every size is a bijection: a Feistel network over ceil(sqrt(size))**2 and cycle walking.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size = {size}: must be from 1 to 2**62")
    radix, keys = math.isqrt(size - 1) + 1, _round_keys(key & MASK)
    if isinstance(index, int):
        if not 0 <= index < size:
            raise ValueError(f"index = {index}: must be in range({size})")
        return _permute_int(index, size, radix, keys)
    index = np.asarray(index)
    if index.size and not (0 <= index.min() and index.max() < size):
        raise ValueError(f"index from {index.min()} to {index.max()}: must be in range({size})")
    return _permute_array(index, size, radix, keys)


def unpermute(index: int, size: int, key: int) -> int:
    """The element that `permute` takes to `index`. ValueError as there."""
    if not 1 <= size <= MAX_SIZE or not 0 <= index < size:
        raise ValueError(f"index = {index}, size = {size}: must be in range(size), and size from 1 to 2**62")
    radix, keys = math.isqrt(size - 1) + 1, _round_keys(key & MASK)
    index = _unfeistel(index, radix, keys)
    while index >= size:
        index = _unfeistel(index, radix, keys)
    return index
