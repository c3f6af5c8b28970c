"""metrics.jsonl: one record per step."""

import json
import os
from pathlib import Path

from k2jax.files import write_atomic


class MetricsFile:
    """metrics.jsonl: one record per step, each exactly once, whatever the run went through."""

    def __init__(self, path: Path, first_step: int):
        """Keep the records of steps before `first_step` (a resumed run does the later ones again), drop the rest."""
        kept = [line for record, line in read_records(path) if record["step"] < first_step]
        write_atomic(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Bring all records to the disk; done before a checkpoint that counts their steps as past."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[tuple[dict, str]]:
    """(record, line) of each complete line; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(json.loads(line), line) for line in lines[:-1]]
