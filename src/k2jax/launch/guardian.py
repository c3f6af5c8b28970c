"""The guardian of `k2jax launch local`: ends what the launcher started if the launcher dies, by SIGKILL even.

The launcher runs this file as a script, in a process group that the ranks join, and holds the other end of its stdin,
which the operating system closes when the launcher exits. It imports nothing of k2jax, so that it starts quickly.
"""

import os
import signal
import sys
import time


def guard(grace: float) -> None:
    """Wait for the end of stdin; then SIGTERM to the whole process group, and SIGKILL after `grace` seconds."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGTERM)
    time.sleep(grace)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    guard(float(sys.argv[1]))
