"""The whole training step of Kimi K2, 1T parameters, compiled for 1,024 TPU v5p, or as many GPUs, that are not here.

    pip install -e '.[tpu-compiler]'
    python benchmarks/k2_aot.py [--section.field value ...]
    pip install -e '.[gpu-compiler]'
    python benchmarks/k2_aot.py --topology h100:128x8

MuonClip, the experts' exchange, routing with its bias, chunked attention and loss, float32 master and momentum, the
guard: what `k2jax train configs/k2_1t.py` compiles. Exits with 1 where it needs more than the bounds below.
"""

import argparse
import resource
import sys
import time

from k2jax.cli.overrides import load_config, override
from k2jax.errors import RunFailed, UserError
from k2jax.launch.distributed import use_cpu_devices

TOPOLOGY = "v5p:8x8x16"
MAX_SECONDS = 600  # to compile, on two cores
MAX_HOST_GIB = 12
MAX_CHIP_GIB = 60  # of a v5p's 95, at four sequences of 4,096 tokens per chip; others may be filled
MIN_TOKENS = 4 * 4096


def exceeded(found: dict, seconds: float, host_gib: float) -> list[str]:
    """The bounds that were not kept."""
    chip_gib = found["memory"]["total"] / 2**30
    most_gib = MAX_CHIP_GIB if found["device_kind"] == "TPU v5" else found["memory_of_device"] / 2**30
    tokens = found["tokens_per_device_and_microbatch"]
    problems = [
        (seconds > MAX_SECONDS, f"{seconds:.0f} s to compile: at most {MAX_SECONDS}"),
        (host_gib > MAX_HOST_GIB, f"{host_gib:.1f} GiB of host memory: at most {MAX_HOST_GIB}"),
        (chip_gib > most_gib, f"{chip_gib:.1f} GiB per chip: at most {most_gib:.0f}"),
        (tokens < MIN_TOKENS, f"{tokens} tokens per chip and microbatch: at least {MIN_TOKENS}"),
        (bool(found["optimizer_beyond_exchanges"]), "the optimizer communicates beyond all-to-all"),
    ]
    return [text for wrong, text in problems if wrong]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default=TOPOLOGY, help="default: %(default)s")
    parser.add_argument("--config", default="configs/k2_1t.py", help="default: %(default)s")
    args, rest = parser.parse_known_args()
    use_cpu_devices(1)
    from k2jax.plan.aot import describe_step, plan_lines
    from k2jax.plan.topology import topology_mesh

    started, cpu = time.monotonic(), time.process_time()
    try:
        config = override(load_config(args.config), rest)
        found = describe_step(config, topology_mesh(config.mesh, args.topology))
    except (UserError, RunFailed) as error:
        print(error, file=sys.stderr)
        return 1
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("\n".join(plan_lines(found)))
    print(f"\n{seconds:.0f} s in all, {cpu:.0f} s of a core; {host_gib:.1f} GiB of host memory at most")
    problems = exceeded(found, seconds, host_gib)
    print("\n".join(f"OVER: {problem}" for problem in problems) or "all bounds kept")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
