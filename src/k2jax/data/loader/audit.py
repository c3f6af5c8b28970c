"""The documents of a step, the steps of a document, the tokens of each source: arithmetic from the segments.

Nothing here asks what a run has done: a timeline says it before, during and after, on any machine.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from k2jax.config import Config
from k2jax.data.loader.corpus import Corpus, held_out_streams
from k2jax.data.loader.rows import RowReader
from k2jax.data.store.manifest import SPLITS
from k2jax.data.store.reader import Stream
from k2jax.errors import UserError


def step_documents(reader: RowReader, step: int) -> Iterator[dict]:
    """Per row of a step: {"place", "row", "source", "epoch", "window", "documents"}, in the order of the batch.

    documents: of each piece in the row, {"name", "sha256", "document", "tokens", "origin"}, where tokens are [first, end)
    in the document.
    """
    timeline = reader.timeline
    rows = timeline.step_rows(step)
    for place, (row, source, epoch, window) in enumerate(
        zip(rows.tolist(), *(v.tolist() for v in timeline.locate(rows)))
    ):
        yield {
            "place": place,
            "row": row,
            "source": timeline.names[source],
            "epoch": epoch,
            "window": window,
            "documents": [*_documents(reader, source, window)],
        }


def _documents(reader: RowReader, source: int, window: int) -> Iterator[dict]:
    stream = reader.stream(source)
    for start, stop in reader.cuts[source].pieces(window):
        first, starts = stream.documents(start, stop)
        records = stream.records(range(first, first + len(starts)))
        for number, record, begin, end in zip(itertools.count(first), records, starts, [*starts[1:], stop]):
            yield {
                **{key: record.get(key) for key in ("name", "sha256", "origin") if key in record},
                "document": number,
                "tokens": [max(start - int(begin), 0), int(end) - int(begin)],
            }


class StoredDocument(NamedTuple):
    """A document. number: of its source in the timeline; None: no step reads it, and `unread` says why."""

    source: str
    document: int
    number: int | None
    unread: str | None


def _texts(reader: RowReader, held_out: Corpus | None) -> Iterator[tuple[StoredDocument, Stream]]:
    """(a StoredDocument without its document, the stream) of all in the stores, and of the text held out elsewhere."""
    for number, stream in reader.streams.items():
        yield StoredDocument(reader.timeline.names[number], -1, number, None), stream
    for store, split in itertools.product(reader.corpus.stores, SPLITS):
        for name, stream in store.streams[split].items():
            if split == "validation":
                yield StoredDocument(name, -1, None, f"held out in {store.path}"), stream
            elif (name, store.digest) not in reader.timeline.keys:
                yield (
                    StoredDocument(name, -1, None, f"of a source in {store.path} that the mixture does not have"),
                    stream,
                )
    for name, stream in (held_out_streams(held_out) if held_out else {}).items():
        yield StoredDocument(name, -1, None, f"held out in {held_out.store_of[name].path}"), stream


def _with_hash(stream: Stream, prefix: str) -> Iterator[int]:
    for document in stream.find(prefix):  # which looks at 16 digits alone
        (record,) = stream.records([document])
        if any(entry["sha256"].startswith(prefix) for entry in (record, record.get("origin", record))):
            yield document


def find_documents(reader: RowReader, wanted: str, held_out: Corpus | None = None) -> list[StoredDocument]:
    """Every document whose sha256, or its origin's, begins with `wanted` (16 digits); if none, that is called so.

    held_out: what data.validation_path has.
    """
    texts, found = [*_texts(reader, held_out)], []
    if re.fullmatch("[0-9a-fA-F]{16,64}", wanted):
        found = [text._replace(document=d) for text, stream in texts for d in _with_hash(stream, wanted.lower())]
    return found or [text._replace(document=d) for text, stream in texts for d in stream.find_name(wanted)]


def document_steps(reader: RowReader, source: int, document: int, num_steps: int) -> list[dict]:
    """Every time the run's first `num_steps` steps see a document: {"step", "place", "row", "epoch", "window"}.

    Steps rise; step is None where data.skip_steps leaves the row out.
    """
    timeline, stream = reader.timeline, reader.stream(source)
    start, stop = stream.borders(document, document + 1).tolist()
    seen, end = [], timeline.rows_before(num_steps)
    for window in reader.cuts[source].windows_with(start, stop):
        for row in timeline.rows_of(source, window, end):
            data_step, place = divmod(row, timeline.batch)
            epoch = int(timeline.locate(row).epoch)
            step = timeline.skips.step_of(data_step)
            seen.append({"step": step, "place": place, "row": row, "epoch": epoch, "window": window})
    return sorted(seen, key=lambda entry: entry["row"])


def sightings(reader: RowReader, documents: list[StoredDocument], num_steps: int) -> Iterator[dict]:
    """`document_steps` of each, with its "source" and "document"; of one that is not trained on, why it is "unread"."""
    for found in documents:
        named = {"source": found.source, "document": found.document}
        if found.number is None:
            yield named | {"unread": found.unread}
        else:
            yield from (named | seen for seen in document_steps(reader, found.number, found.document, num_steps))


def token_account(reader: RowReader, config: Config, step: int) -> list[dict]:
    """Per source, after `step` steps: rows and tokens it gave, its share, what the weights ask for, passes over it.

    All of what training has read: rows that data.skip_steps leaves out count as "skipped_rows" and nowhere else.
    """
    timeline, end = reader.timeline, reader.timeline.rows_before(step)
    ranges = timeline.skips.before(timeline.skips.next_data_step(step))
    borders = [(first * timeline.batch, stop * timeline.batch) for first, stop in ranges]

    def read(before: Callable[[int], np.ndarray]) -> np.ndarray:
        return before(end) - sum(before(stop) - before(first) for first, stop in borders)

    rows, planned = read(timeline.counts), read(timeline.planned)
    total = max(1, int(rows.sum()))
    return [
        {
            "source": name,
            "store": store,
            "rows": int(rows[number]),
            "tokens": int(rows[number]) * config.data.sequence_length,
            "skipped_rows": int(timeline.counts(end)[number] - rows[number]),
            "share": int(rows[number]) / total,
            "planned_share": float(planned[number]) / total,
            "epochs": int(rows[number]) / int(timeline.windows[number]),
        }
        for number, (name, store) in enumerate(timeline.keys)
    ]


def check_step(step: int, num_steps: int) -> None:
    """UserError for a step that the run does not have."""
    if not 0 <= step < num_steps:
        raise UserError(
            f"--step {step}: the run has steps 0 to {num_steps - 1}; nearest: {min(max(step, 0), num_steps - 1)}"
        )
