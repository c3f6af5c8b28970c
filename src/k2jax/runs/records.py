"""Files of one JSON record per line, such as metrics.jsonl: each line carries a check of its own content."""

import json
import os
import stat
import zlib
from pathlib import Path

from k2jax.errors import UserError
from k2jax.files import naming, parse_json, write_atomic


def _crc32(record: dict) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def to_line(record: dict) -> str:
    """A record as a line: its JSON with `crc32`, 8 hex digits over the other values in the order of their names."""
    return json.dumps(record | {"crc32": _crc32(record)}) + "\n"


def _from_line(where: str, line: bytes) -> dict:
    record = parse_json(where, line)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise UserError(f"{where}: must be an object with the number of its step; restore the file from a copy")
    found = _crc32({name: value for name, value in record.items() if name != "crc32"})
    if record.pop("crc32", None) != found:
        raise UserError(f"{where}: was changed (its crc32 is {found}); restore the file from a copy")
    return record


def _lines(path: Path) -> list[bytes]:
    """The complete lines of a file of any size; [] if there is none. A pipe or device might never end."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: is not a regular file; put the file itself there")
            return file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_records(path: Path, ordered: bool = True) -> list[dict]:
    """The records of all complete lines, without their checks; a last line cut short by a crash is ignored.

    ordered: no step comes before the one above it. [] if there is no such file. Raises UserError with every line that is not as it was written.
    """
    records, problems, before = [], [], None
    for number, line in enumerate(_lines(path), 1):
        try:
            record = _from_line(f"{path}:{number}", line)
            if ordered and before is not None and (record == before or record["step"] < before["step"]):
                raise UserError(f"{path}:{number}: repeats or precedes the line before; restore the file from a copy")
            records.append(record)
            before = record
        except UserError as error:
            problems += error.problems
    if problems:
        rest = [f"{path}: {len(problems)} damaged lines in all"] if len(problems) > 10 else []
        raise UserError(*problems[:10], *rest)
    return records


class RecordFile:
    """A file of records, open to append to: for one that ran before, without the steps that are done again."""

    def __init__(self, path: Path, first_step: int):
        """Keep the records of steps before `first_step`, which a resumed run does not repeat; drop the others."""
        records = read_records(path)
        kept = [record for record in records if record["step"] < first_step]
        self.dropped = records[len(kept) :]
        write_atomic(path, "".join(map(to_line, kept)))
        self._path, self._file = path, open(path, "a", encoding="utf-8")

    def write(self, record: dict) -> None:
        """Append one record. OSError, with the file's name, if the disk does not take it."""
        with naming(self._path):
            self._file.write(to_line(record))
            self._file.flush()

    def sync(self) -> None:
        """Return when all records are on the disk: before a checkpoint that counts their steps as past."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. OSError as `write` raises it: a record that failed is tried again."""
        with naming(self._path):
            self._file.close()
