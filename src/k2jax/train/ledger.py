"""ledger.jsonl of a run: which rows of its data were bad, and what was read in their place."""

from pathlib import Path

import numpy as np

from k2jax.config import Config
from k2jax.data.loader.rows import BadRow, RowReader
from k2jax.errors import RunFailed
from k2jax.files import naming, write_atomic
from k2jax.processes import gather, is_first, on_first
from k2jax.runs.records import read_records, to_line
from k2jax.words import counted


class Ledger:
    """ledger.jsonl: one record per row that was replaced, each exactly once, and the end of the run past the budget.

    Every process notes the rows that it read; the first writes those of all at the next save.
    """

    def __init__(self, path: Path, reader: RowReader, config: Config, first_step: int, places: np.ndarray):
        self.path, self.reader, self.limit, self.places = path, reader, config.data.max_bad_rows, places
        self.held: list[dict] = []

        def keep() -> int:
            records = read_records(path)
            kept = [record for record in records if record["step"] < first_step]
            if records != kept:  # a resumed run does the later steps again
                write_atomic(path, "".join(map(to_line, kept)))
            return len(kept)

        self.count = on_first("ledger", keep)

    def enter(self, step: int, replaced: np.ndarray) -> None:
        """Note the rows of a step that were replaced, of those at `places`. RunFailed past data.max_bad_rows."""
        timeline = self.reader.timeline
        rows = timeline.step_rows(step)
        for number in np.flatnonzero(replaced >= 0).tolist():
            row = rows[self.places[number]]
            source, _, window = (int(value) for value in timeline.locate(row))
            try:
                self.reader.read_window(source, window)
                why = "could be read later"
            except BadRow as error:
                why = str(error)
            entry = {"step": step, "row": int(row), "source": timeline.names[source], "window": window}
            self.held.append(entry | {"replaced_by": int(replaced[number]), "why": why})
        if self.count + len(self.held) > self.limit:  # the others' may be more still: this ends the run for all
            # Several may come here at once, with the same rows even; the file stays one that a resume can read.
            (self._write if is_first() else self._count)(self.held)

    def _write(self, entries: list[dict]) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(map(to_line, entries)))
        self._count(entries)

    def _count(self, entries: list[dict]) -> None:
        self.count += len(entries)
        if self.count > self.limit:
            rule = f"data.max_bad_rows = {self.limit} were allowed; repair the store or allow more"
            rule += f"; {'all' if is_first() else 'those until the last save'} are in {self.path}"
            last = entries[-1]
            raise RunFailed(f"{counted(self.count, 'bad row')} by step {last['step']}, the last: {last['why']}; {rule}")

    def sync(self) -> None:
        """In all processes at once: write what any of them noted since the last time. Raises as `enter`."""
        if self.limit == 0:
            return
        found = {(entry["step"], entry["row"]): entry for part in gather("ledger", self.held) for entry in part}
        entries, self.held = [found[key] for key in sorted(found)], []
        (self._write if is_first() else self._count)(entries)
