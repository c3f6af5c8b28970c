"""Write the golden counts of collectives: python tests/train/make_golden.py.

When that is right: collective_counts.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import conftest  # noqa: E402  eight CPU devices, and the model of the tests
from collective_counts import MESHES, count, path_of, write  # noqa: E402

if __name__ == "__main__":
    for axes in MESHES:
        write(axes, count(conftest.tiny_model(), axes))
        print(path_of(axes))
