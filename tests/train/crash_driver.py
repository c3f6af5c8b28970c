"""Run the `k2jax` command and send this process a signal at a chosen moment: crash_driver.py MOMENT ARGUMENTS...

file:K          SIGKILL at the K-th operation on a file or folder inside the run directory
metrics:STEP    SIGKILL when half of the record of STEP is written
term:STEP       SIGTERM when the record of STEP has been written
count           no signal; prints the number of operations that file:K counts
"""

import json
import os
import signal
import sys
import threading

from k2jax.cli.main import main
from k2jax.runs import records

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


class FileOperations:
    """Audit hook that counts operations in the run directory, those of background threads too."""

    def __init__(self, folder: str, fatal: int | None):
        self.folder, self.fatal, self.count, self.lock = os.path.abspath(folder), fatal, 0, threading.Lock()

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in FILE_EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if os.path.abspath(os.fspath(arguments[0])).startswith(self.folder):
            with self.lock:
                self.count += 1
                if self.count == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)


def signal_at_record(step: int, number: int, half: bool) -> None:
    whole = records.RecordFile.write

    def write(self, record: dict) -> None:
        if record["step"] == step and half:
            text = json.dumps(record)
            self._file.write(text[: len(text) // 2])
            self._file.flush()
            os.kill(os.getpid(), number)
        whole(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), number)

    records.RecordFile.write = write


if __name__ == "__main__":
    kind, _, value = sys.argv[1].partition(":")
    sys.argv[1:] = sys.argv[2:]
    operations = FileOperations("run", int(value) if kind == "file" else None)
    sys.addaudithook(operations)
    if kind in ("metrics", "term"):
        signal_at_record(int(value), signal.SIGKILL if kind == "metrics" else signal.SIGTERM, half=kind == "metrics")
    code = main()
    print(f"file operations: {operations.count}")
    sys.exit(code)
