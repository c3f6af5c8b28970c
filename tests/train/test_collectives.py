"""The collectives of the compiled training step are those of the golden files, on six meshes."""

import jax
import pytest
from collective_counts import MESHES, NUM_MOE_LAYERS, count, path_of, read

# One mesh by default, the others where there is time.
TIERS = {"tensor": ()}
MARKS = [next((TIERS[axis] for axis in axes if axis in TIERS), pytest.mark.grid) for axes in MESHES]
PARAMETERS = [pytest.param(axes, marks=marks, id=str(axes)) for axes, marks in zip(MESHES, MARKS, strict=True)]


@pytest.mark.parametrize("axes", PARAMETERS)
def test_collectives_of_a_step(tiny, axes):
    golden = read(axes)
    if golden["jax"] != jax.__version__:
        pytest.skip(f"the counts are those of jax {golden['jax']}'s compiler, this is {jax.__version__}")
    got = count(tiny, axes)
    keys = [{k: line[k] for k in ("where", "kind", "axes")} for line in got]
    assert any(key["where"] == "MoE layer" for key in keys), f"no loop of {NUM_MOE_LAYERS} turns has a collective"
    want = golden["collectives"]
    more, less = [line for line in got if line not in want], [line for line in want if line not in got]
    told = "\n".join([f"  now     {line}" for line in more] + [f"  golden  {line}" for line in less])
    assert not told, (
        f"a step on {axes} communicates otherwise than {path_of(axes).name} says:\n{told}\n"
        "If that was meant (a layout, an exchange or a remat policy changed, or jax did), look whether it is what you "
        "wanted a step to send, write new files with `python tests/train/make_golden.py` and commit them with the "
        "change. If not, an array is laid out otherwise than before: the kind and the axes say which."
    )


def test_every_mesh_has_a_file():
    assert sorted(path_of(MESHES[0]).parent.glob("*.json")) == sorted(map(path_of, MESHES))
