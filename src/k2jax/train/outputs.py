"""Everything that a run shows and writes beside its checkpoints, in one value with one owner."""

import contextlib
from pathlib import Path

from k2jax.config import Config
from k2jax.data.loader.segments import write_segments
from k2jax.data.saved_tokenizer import save_tokenizer
from k2jax.data.tokenizer import Tokenizer
from k2jax.files import write_atomic
from k2jax.runs.folder import write_config
from k2jax.runs.records import RecordFile
from k2jax.train.banner import versions
from k2jax.train.display import Display
from k2jax.train.metrics import TensorBoard


class Outputs:
    """Display, metrics.jsonl, TensorBoard, and the small files that say what a run is."""

    def __init__(self, folder: Path, config: Config, first_step: int):
        self._folder, self._first_step, self._records = folder, first_step, ()
        self.display = Display(first_step, config.train.num_steps, config.train.log_every)

    def describe(self, config: Config, segments: list[dict], tokenizer: Tokenizer | None) -> None:
        """Write config.json, timeline.json, tokenizer/ and env.txt."""
        write_config(self._folder, config)  # first: a folder without it is not a run
        write_segments(self._folder, segments)
        if tokenizer is not None:
            save_tokenizer(tokenizer, self._folder / "tokenizer")
        write_atomic(self._folder / "env.txt", "".join(f"{name} {version}\n" for name, version in versions().items()))

    def say(self, text: str) -> None:
        self.display.say(text)

    def phase(self, name: str) -> contextlib.AbstractContextManager[list[str]]:
        """A named part of the start, shown with its duration and with the notes appended to the yielded list."""
        return self.display.phase(name)

    def open_records(self) -> None:
        """Open metrics.jsonl and TensorBoard, dropping the records of steps that a resumed run repeats."""
        metrics = RecordFile(self._folder / "metrics.jsonl", self._first_step)
        self._records = metrics, TensorBoard(self._folder / "tb", self._first_step)

    def record(self, record: dict) -> None:
        """Write the record of one step, and show it."""
        for file in self._records:
            file.write(record)
        self.display.step(record)

    def sync(self) -> None:
        """Return when every record given so far is on the disk."""
        self._records[0].sync()

    def close(self) -> None:
        for file in self._records:
            file.close()
        self.display.close()
