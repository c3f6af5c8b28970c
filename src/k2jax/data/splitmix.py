"""The finalizer of splitmix64 (Steele, Lea and Flood 2014), for integers and for arrays of them."""

import numpy as np

MASK = 2**64 - 1


def mix(x: int | np.ndarray) -> int | np.ndarray:
    """A bijection of 64-bit words in which every output bit depends on every input bit.

    x: an int in [0, 2**64) or a uint64 array. Both take the same operators; `& MASK` gives ints the wrap-around.
    """
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)
