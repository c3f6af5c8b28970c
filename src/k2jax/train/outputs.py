"""Everything that a run shows and writes beside its checkpoints, in one value with one owner: the first process."""

import contextlib
from collections.abc import Iterator

from rich.console import Console

from k2jax.config import Config
from k2jax.data.loader.segments import write_segments
from k2jax.data.saved_tokenizer import save_tokenizer
from k2jax.data.tokenizer import Tokenizer
from k2jax.files import write_atomic
from k2jax.preflight.ranks import versions
from k2jax.processes import index, is_first
from k2jax.runs.folder import RunFolder, write_config
from k2jax.runs.goodput import TimeLog
from k2jax.runs.identity import make_identity
from k2jax.runs.records import RecordFile
from k2jax.train.display import Display
from k2jax.train.metrics import TensorBoard
from k2jax.train.replay import Replay
from k2jax.train.watchdog import Watchdog


def describe_run(folder: RunFolder, config: Config, segments: list[dict], tokenizer: Tokenizer | None) -> None:
    """Write config.json, run.json, timeline.json, tokenizer/ and env.txt. In the first process alone."""
    write_config(folder.path, config)  # first: a folder without it is not a run
    make_identity(folder.path)
    write_segments(folder.timeline, segments)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder.tokenizer)
    write_atomic(folder.env, "".join(f"{name} {version}\n" for name, version in versions().items()))


class Outputs:
    """Display, metrics.jsonl, TensorBoard, the account of this start's time, and the watchdog that follows it.

    The other processes write nothing, or with train.log_ranks what the first displays, as they see it, in ranks/N.log.
    """

    def __init__(self, folder: RunFolder, config: Config, first_step: int):
        self._folder, self._first_step, self._replay_bound = folder, first_step, config.train.replay_bound
        self._files, self._records = contextlib.ExitStack(), ()
        console = None if is_first() else Console(quiet=True)
        if not is_first() and config.train.log_ranks:
            folder.ranks.mkdir(exist_ok=True)
            log = self._files.enter_context(open(folder.ranks / f"{index()}.log", "a", encoding="utf-8", buffering=1))
            console = Console(file=log, soft_wrap=True, highlight=False)
        self.display = Display(first_step, config.train.num_steps, config.train.log_every, console)
        self._files.callback(self.display.close)
        self.watchdog = Watchdog(config.watchdog, folder.ranks)
        self.time = TimeLog(folder.time if is_first() else None, first_step, self.watchdog.watch)
        self._files.callback(self.time.close)
        self.watchdog.start(self.time.hung)
        self._files.callback(self.watchdog.stop)

    def say(self, text: str) -> None:
        self.display.say(text)

    @contextlib.contextmanager
    def phase(self, name: str, kind: str) -> Iterator[list[str]]:
        """A named part of the start, shown with its duration and with the notes appended to the yielded list.

        kind: of the account of time.
        """
        with self.time.spent_on(kind), self.display.phase(name) as notes:
            yield notes

    def open_records(self) -> None:
        """Open metrics.jsonl and TensorBoard, dropping the records of steps that a resumed run repeats."""
        if is_first():
            metrics = RecordFile(self._folder.metrics, self._first_step)
            self._replay = Replay(metrics.dropped, self._replay_bound)
            self._records = metrics, TensorBoard(self._folder.tensorboard, self._first_step)
            for file in self._records:
                self._files.callback(file.close)

    def record(self, record: dict) -> None:
        """Write the record of one step, and show it. Raises RunFailed as `Replay` does, for a step done again."""
        for file in self._records:
            file.write(record)
        self.display.step(record)
        if self._records and (text := self._replay.compare(record)):
            self.say(text)
        self.time.tick(record["step"] + 1)

    def sync(self) -> None:
        """Return when every record given so far is on the disk."""
        if self._records:
            self._records[0].sync()

    def close(self) -> None:
        """Close everything, also if closing a part of it fails."""
        self._files.close()
