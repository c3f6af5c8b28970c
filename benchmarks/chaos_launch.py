"""The smallest run under its supervisor, with a fault: chaos_launch.py EVENT PROCESSES RESTARTS TRAIN-OPTIONS...

EVENT: as tests/train/process_driver.py has them. What `k2jax launch local` does, but for the command that it starts.
"""

import sys
from pathlib import Path

from k2jax.launch.local import run_again

TESTS = Path(__file__).parents[1] / "tests" / "train"

if __name__ == "__main__":
    event, processes, restarts, *options = sys.argv[1:]
    argv = [sys.executable, "-u", str(TESTS / "process_driver.py"), event, "train", str(TESTS / "micro.py"), *options]
    sys.exit(run_again(argv, int(processes), 1, None, int(restarts)))
