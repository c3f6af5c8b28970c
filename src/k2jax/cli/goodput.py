"""`k2jax goodput`."""

import json
import time

from k2jax.runs.folder import read_config
from k2jax.runs.goodput import account, read_starts
from k2jax.tables import aligned


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def goodput(args, rest: list[str]) -> int:
    """Print the seconds of a run by kind over all of its starts, and each start."""
    from k2jax.runs.mirror import open_run_folder

    files = open_run_folder(args.run)
    read_config(files.path)
    starts = read_starts(files.time)
    seconds = account(starts)
    total = sum(seconds.values())
    share = seconds["step"] / total if total else 0.0
    if args.json:
        rows = [vars(start) | {"unix": list(start.unix)} for start in starts]
        print(json.dumps({"goodput": share, "seconds": seconds, "starts": rows}, indent=2))
        return 0
    print(f"goodput {share:.1%}: steps that were kept, of {_clock(total)} from the first start to the last line")
    print("\n".join(aligned([(kind, _clock(value), f"{value / total if total else 0:6.1%}") for kind, value in seconds.items()])))
    table = [("start", "began", "steps", "lost", "ended")]
    for number, start in enumerate(starts, 1):
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.unix[0]))
        ended = "by itself" if start.ended else "killed, or runs still" if start is starts[-1] else "killed"
        table.append((str(number), began, f"{start.first} to {start.last}", str(start.last - start.kept), ended))
    print("\n".join(["", *aligned(table)]))
    return 0
