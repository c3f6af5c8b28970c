"""The fault scoreboard: real runs of several processes, a fault in each, and what their supervisor made of it.

    python benchmarks/chaos.py [--fast] [--only A1,B3] [--soak SECONDS] [--seed N]

PASS: the run ended in the same bits without a human; LOUD: it stopped safely with a clear error; FAIL: it hung, lost too
much or was unclear; SILENT: something was wrong and unnoticed. Exits with 1 for any FAIL or SILENT.
"""

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from chaos_rig import Outcome, Rig
from chaos_rows import FAST, ROWS, soak


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main() -> int:
    parser = argparse.ArgumentParser(description="The fault scoreboard.")
    parser.add_argument("--fast", action="store_true", help=f"only {', '.join(FAST)}")
    parser.add_argument("--only", default="", metavar="A1,B3", help="only these rows")
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS", help="random faults for so long, at the end")
    parser.add_argument("--seed", type=int, default=0, help="of the soak (default: %(default)s)")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else [*(FAST if args.fast else () if args.soak else ROWS)]
    if unknown := [name for name in wanted if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    rows = {name: ROWS[name] for name in wanted} | ({"G1": ("soak", soak(args.soak, args.seed))} if args.soak else {})
    began, outcomes = time.monotonic(), []
    print(f"{'row':5} {'fault':42} {'verdict':7} {'noticed':>8} {'lost':>4}  what", flush=True)
    with tempfile.TemporaryDirectory(prefix="k2jax-chaos-") as folder:
        rig = Rig(Path(folder))
        for name, (fault, scenario) in rows.items():
            try:
                outcome = scenario(rig)
            except Exception as error:  # noqa: BLE001 - a scenario that breaks is a row that did not hold
                traceback.print_exc()
                outcome = Outcome("FAIL", f"{type(error).__name__}: {error}"[:150])
            outcomes.append(outcome)
            noticed = _shown(outcome.seconds, ".1f") and f"{outcome.seconds:.1f} s"
            print(f"{name:5} {fault:42} {outcome.verdict:7} {noticed:>8} {_shown(outcome.lost, 'd'):>4}  {outcome.what}", flush=True)
    count = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("PASS", "LOUD", "FAIL", "SILENT")}
    lost = max((o.lost or 0 for o in outcomes), default=0)
    noticed = max((o.seconds or 0 for o in outcomes), default=0)
    print(f"PASS + LOUD {count['PASS'] + count['LOUD']} of {len(outcomes)}, FAIL {count['FAIL']}, SILENT {count['SILENT']}; noticed in "
          f"{noticed:.0f} s at most, {lost} steps lost at most; {time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if count["FAIL"] or count["SILENT"] else 0


if __name__ == "__main__":
    sys.exit(main())
