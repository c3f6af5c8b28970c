"""timeline.json and ledger.jsonl of a run: what its data is, and which rows of it were bad."""

from pathlib import Path

import numpy as np

from k2jax.config import Config
from k2jax.data.loader.rows import BadRow, RowReader
from k2jax.errors import RunFailed
from k2jax.files import naming, write_atomic
from k2jax.runs.records import read_records, to_line


class Ledger:
    """ledger.jsonl: one record per row that was replaced, each exactly once, and the end of the run past the budget."""

    def __init__(self, path: Path, reader: RowReader, config: Config, first_step: int):
        self.path, self.reader, self.limit = path, reader, config.data.max_bad_rows
        records = read_records(path)
        kept = [record for record in records if record["step"] < first_step]
        self.count = len(kept)
        if records != kept:  # a resumed run does the later steps again
            write_atomic(path, "".join(map(to_line, kept)))

    def enter(self, step: int, replaced: np.ndarray) -> None:
        """Note the rows of a step that were replaced. RunFailed if they are more than data.max_bad_rows."""
        timeline = self.reader.timeline
        for place in np.flatnonzero(replaced >= 0).tolist():
            row = timeline.step_rows(step)[place]
            source, _, window = (int(value) for value in timeline.locate(row))
            try:
                self.reader.read_window(source, window)
                why = "could be read later"
            except BadRow as error:
                why = str(error)
            entry = {"step": step, "row": int(row), "source": timeline.names[source], "window": window}
            entry |= {"replaced_by": int(replaced[place]), "why": why}
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(to_line(entry))
            self.count += 1
            if self.count > self.limit:
                rule = f"data.max_bad_rows = {self.limit} were allowed; repair the store or allow more"
                rule += f"; all are in {self.path}"
                raise RunFailed(f"{self.count} bad rows by step {step}, the last: {why}; {rule}")
