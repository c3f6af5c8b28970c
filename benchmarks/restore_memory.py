"""Peak host memory of a restore for inference, on one CPU device and on a mesh of 8, against the model's size.

python benchmarks/restore_memory.py. Each restore in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Peak

MESHES = {1: [{}], 8: [{"fsdp": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 8}]}


def model(size: str):
    """small: 2 MB, for what a restore takes whatever the model is. large: 667 MB in float32."""
    from k2jax.config import ModelConfig

    width, experts, vocabulary = {"small": (64, 16, 256), "large": (512, 1024, 8192)}[size]
    return ModelConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=4, num_attention_heads=8, q_lora_rank=64,
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, intermediate_size=2 * width,
        moe_intermediate_size=experts, n_routed_experts=32, num_experts_per_tok=2,
    )  # fmt: skip


def save(folder: str, size: str) -> None:
    """Write the untrained model as a run."""
    import jax

    from k2jax.config import Config
    from k2jax.model.transformer import declarations, init_router_bias
    from k2jax.model.weights import init_params
    from k2jax.runs.folder import RunFolder, write_config
    from k2jax.runs.identity import make_identity
    from k2jax.train.checkpoint import model_part, save_model

    config = Config(model=model(size))
    params = jax.jit(lambda: init_params(declarations(config.model), jax.random.key(0), 0.02))()
    Path(folder).mkdir()
    write_config(Path(folder), config)
    make_identity(Path(folder))
    save_model(RunFolder(Path(folder)).checkpoints, model_part(params, init_router_bias(config.model)))


def restore(folder: str, sizes: dict[str, int]) -> dict:
    """Bytes of the model on all devices, and the largest growth of this process while it is restored."""
    import jax

    from k2jax.config import MeshConfig
    from k2jax.inference.load import load_run

    jax.device_put(0, jax.devices()[-1]).block_until_ready()
    with Peak() as peak:
        loaded = load_run(folder, sizes=MeshConfig(**sizes) if sizes else None)
        arrays = jax.tree.leaves((loaded.state.params, loaded.state.router_bias))
        jax.block_until_ready(arrays)
    size = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    return {"model": size, "peak": peak.more}


def restored(folder: str, devices: int, sizes: dict[str, int]) -> dict:
    """`restore` in a process of its own."""
    command = [sys.executable, __file__, "--restore", folder, str(devices), json.dumps(sizes)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--restore", nargs=3, metavar=("RUN", "DEVICES", "MESH"), help="in this process")
    args = parser.parse_args()
    if args.restore:
        from k2jax.launch.distributed import use_cpu_devices

        folder, devices, sizes = args.restore
        use_cpu_devices(int(devices))
        print(json.dumps(restore(folder, json.loads(sizes))))
        return
    with tempfile.TemporaryDirectory() as place:
        for size in ("small", "large"):
            save(f"{place}/{size}", size)
        for devices, sizes in ((devices, sizes) for devices, meshes in MESHES.items() for sizes in meshes):
            small, large = (restored(f"{place}/{size}", devices, sizes) for size in ("small", "large"))
            share = (large["peak"] - small["peak"]) / (large["model"] - small["model"])
            print(
                f"{sizes or 'one device'}: model {large['model'] / 1e6:.0f} MB, peak {large['peak'] / 1e6:.0f} MB, "
                f"of which {small['peak'] / 1e6:.0f} MB whatever the model is; the rest is {share:.2f} of the model"
            )


if __name__ == "__main__":
    main()
