"""In a process of its own, as the lowering is for the whole of it: prints what test_gloo.py looks at, as JSON."""

import json
from functools import partial

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import micro
import numpy as np

import k2jax
from k2jax.sharding.gloo import sum_after_all_to_all
from k2jax.train.compile_step import lower_step


def scattered(mesh, dim: int, tiled: bool, axis) -> jax.Array:
    values = np.random.default_rng(0).integers(-99, 99, (8, 8, 16, 8)).astype(np.float32)

    cut = jax.P(("fsdp", "expert", "tensor"))

    @partial(jax.shard_map, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
    def reduce(x):
        return jax.lax.psum_scatter(x[0], axis, scatter_dimension=dim, tiled=tiled)[None]

    return jax.jit(reduce)(jax.device_put(values, jax.NamedSharding(mesh, cut)))


def results() -> list:
    mesh = k2jax.mesh_of(fsdp=2, expert=2, tensor=2)
    cases = [(dim, True, axis) for dim in (0, 1, 2) for axis in ("expert", ("fsdp", "tensor"), ("fsdp", "expert", "tensor"))]
    cases += [(0, False, ("fsdp", "expert", "tensor")), (2, False, ("fsdp", "expert", "tensor"))]
    return [np.asarray(scattered(mesh, *case)).tolist() for case in cases]


def step_text() -> str:
    config = micro.config().replace({"mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2})
    return lower_step(config, k2jax.mesh_of(fsdp=2, expert=2, tensor=2))[0].compile().as_text()


if __name__ == "__main__":
    before, text_before = results(), step_text()
    sum_after_all_to_all()
    jax.clear_caches()
    after, text_after = results(), step_text()
    counts = [text.count(" reduce-scatter(") for text in (text_before, text_after)]
    print(json.dumps({"equal": before == after, "numbers": len(np.ravel(before[0])), "reduce_scatters": counts}))
