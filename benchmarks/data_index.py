"""Row ids of a run over 15.5T tokens: speed, memory, uniqueness, shares, processes and resumes.

python benchmarks/data_index.py [--rows 10000000] [--processes]

Simulated: four sources with 3.8 billion windows of 4,096 tokens, five phases. Exits with 1 where a bound is missed.
--processes also begins 400 fresh Python processes, which read the run's files as a resume does: some minutes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from k2jax.config import Config
from k2jax.data.loader.timeline import make_timeline
from k2jax.runs.folder import write_config

WINDOWS = {"web": 2_300_000_000, "code": 900_000_000, "math": 350_000_000, "knowledge": 250_000_000}
TRILLION = 10**12
PHASES = [
    [0, {"web": 60, "code": 25, "math": 9, "knowledge": 6}],
    [3 * TRILLION, {"web": 620, "code": 230, "math": 90, "knowledge": 60}],
    [7 * TRILLION, {"web": 58_999, "code": 24_001, "math": 10_000, "knowledge": 7_000}],
    [10 * TRILLION, {"web": 11, "code": 5, "math": 2, "knowledge": 2}],
    [13 * TRILLION, {"web": 5, "code": 3, "math": 1, "knowledge": 1}],
]
STEPS, SEQUENCES, LENGTH = 230_968, 16_384, 4096
FRESH = """import json, sys
import numpy as np
from k2jax.config import Config
from k2jax.data.loader.timeline import make_timeline
folder, step, processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = read_config(Path(folder))
timeline = make_timeline(json.load(open(folder + "/timeline.json")), config)
place = timeline.locate(timeline.step_rows(step).reshape(processes, -1)[step % processes])
print(json.dumps([values.tolist() for values in place]))
"""


def simulated(batch: int = SEQUENCES):
    """(plan, config) of the run."""
    names = {
        name: {"windows": count, "epochs": 3, "store": "simulated", "packing": None} for name, count in WINDOWS.items()
    }
    plan = [{"from_step": 0, "path": "simulated", "digest": "simulated", "sources": names, "phases": PHASES}]
    config = Config().replace({"data.sequence_length": LENGTH, "data.batch_sequences": batch})
    return plan, config


def best_of(function, tries: int) -> tuple[float, float]:
    """(median, minimum) milliseconds."""
    times = []
    for number in range(tries):
        started = time.perf_counter()
        function(number)
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times)), min(times)


def speed(timeline) -> dict:
    rng = np.random.default_rng(0)
    steps = rng.integers(0, STEPS, 200)
    whole = best_of(lambda n: timeline.locate(timeline.step_rows(int(steps[n]))), 50)
    host = best_of(lambda n: timeline.locate(timeline.step_rows(int(steps[n]))[64 * (n % 256) :][:64]), 200)
    return {"all 16,384 rows, ms (median, best)": whole, "one host's 64 rows, ms (median, best)": host}


def unique_windows(timeline, rows: int) -> dict:
    """Rows sampled all over the run, and one dense stretch: no two have the same window in the same pass."""
    rng, found, total = np.random.default_rng(1), [], STEPS * SEQUENCES
    starts = np.sort(rng.choice(total // 100_000, rows // 100_000, replace=False)) * 100_000
    for start in starts.tolist():
        place = timeline.locate(np.arange(start, start + 100_000))
        # source (2 bits), pass (4 bits) and window (32 bits) in one number
        assert place.epoch.max() < 16 and place.window.max() < 2**32
        found.append((place.source * 16 + place.epoch) << 32 | place.window)
    found = np.concatenate(found)
    return {"sampled rows": len(found), "repeated within a pass": len(found) - len(np.unique(found))}


def share_error(timeline) -> float:
    """Largest difference of a source's share from the plan, over the ends of the phases and of the run."""
    worst, batch_tokens = 0.0, SEQUENCES * LENGTH
    ends = [-(-tokens // batch_tokens) for tokens, _ in PHASES[1:]] + [STEPS]
    for step in ends:
        rows = step * SEQUENCES
        worst = max(worst, float(np.abs(timeline.counts(rows) - timeline.planned(rows)).max() / rows))
    return worst


def processes_and_resumes() -> dict:
    """Steps 0 to 200: shares of 1, 2, 3, 4 and 8 processes, and every step from a process of its own, twice."""
    plan, config = simulated(24 * 64)
    timeline = make_timeline(plan, config)
    expected = [[values.tolist() for values in timeline.locate(timeline.step_rows(step))] for step in range(201)]
    differing = 0
    for count in (1, 2, 3, 4, 8):
        for step in range(201):
            shares = [timeline.locate(rows) for rows in np.split(timeline.step_rows(step), count)]
            joined = [np.concatenate(values).tolist() for values in zip(*shares, strict=True)]
            differing += joined != expected[step]
    fresh, counts = 0, (1, 2, 3, 4, 8)
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), config)
        (Path(folder) / "timeline.json").write_text(json.dumps(plan))
        for step in [*range(200), *range(200)]:
            count = counts[(step + fresh) % 5]
            done = subprocess.run(
                [sys.executable, "-c", FRESH, folder, str(step), str(count)], capture_output=True, text=True, check=True
            )
            size = len(expected[step][0]) // count
            mine = slice(size * (step % count), size * (step % count + 1))
            differing += json.loads(done.stdout) != [values[mine] for values in expected[step]]
            fresh += 1
    return {"fresh processes": fresh, "steps that differ": differing}


def rates() -> dict:
    """Learning rates of the published schedule (k2_1t's), by tokens."""
    from k2jax.optim.schedule import learning_rate

    optim = Config().optim
    return {f"{t:g}T": float(learning_rate(optim, t * TRILLION)) for t in (10, 12.75, 15.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--processes", action="store_true")
    args = parser.parse_args()
    # What the index itself takes: this process before it, and at its peak, less the sampled numbers themselves.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    timeline = make_timeline(*simulated())
    figures = speed(timeline)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures |= {"MiB of the process before and with the index": (before, after)}
    figures |= {"windows": sum(WINDOWS.values()), "share error": share_error(timeline)}
    figures |= unique_windows(timeline, args.rows)
    if args.processes:
        figures |= processes_and_resumes()
    figures |= rates()
    for name, value in figures.items():
        print(f"{name}: {value}")
    met = [
        figures["all 16,384 rows, ms (median, best)"][0] < 20,
        figures["one host's 64 rows, ms (median, best)"][0] < 1,
        after < 200,
        figures["repeated within a pass"] == 0,
        figures["share error"] < 1e-6,
        figures.get("steps that differ", 0) == 0,
    ]
    met += [abs(figures[f"{t}T"] / rate - 1) < 1e-5 for t, rate in (("10", 2e-4), ("12.75", 1.1e-4), ("15.5", 2e-5))]
    sys.exit(0 if all(met) else f"missed: {met}")


if __name__ == "__main__":
    main()
