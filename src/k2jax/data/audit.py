"""Which documents were in a step, which steps saw a document, and what each source gave: arithmetic from a plan.

Nothing here asks what a run has done: a timeline says it before, during and after, on any machine.
"""

import itertools
import re
from collections.abc import Iterator

from k2jax.config import Config, UserError
from k2jax.data.rows import RowReader


def step_documents(reader: RowReader, step: int) -> Iterator[dict]:
    """Per row of a step: {"place", "row", "source", "epoch", "window", "documents"}, in the order of the batch.

    documents: of each piece in the row, {"name", "sha256", "document", "tokens": [first, end) in the document, "origin"}.
    """
    timeline = reader.timeline
    rows = timeline.step_rows(step)
    for place, (row, source, epoch, window) in enumerate(zip(rows.tolist(), *(v.tolist() for v in timeline.locate(rows)))):
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


def find_documents(reader: RowReader, wanted: str) -> list[tuple[int, int]]:
    """(source, document) of every document called `wanted`, or whose sha256, or its origin's, begins so (16 digits)."""
    found = []
    for source, stream in reader.streams.items():
        hits = stream.find(wanted) if re.fullmatch("[0-9a-f]{16,64}", wanted) else stream.find_name(wanted)
        found += [(source, document) for document in hits]
    return found


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


def token_account(reader: RowReader, config: Config, step: int) -> list[dict]:
    """Per source, after `step` steps: rows and tokens it gave, its share, what the weights ask for, passes over it."""
    timeline = reader.timeline
    rows, batch, length = timeline.counts(timeline.rows_before(step)), timeline.batch, config.data.sequence_length
    skipped = [timeline.counts(stop * batch) - timeline.counts(first * batch) for first, stop in timeline.skips.before(
        timeline.skips.next_data_step(step))]
    read = rows - sum(skipped) if skipped else rows
    planned = timeline.planned(timeline.rows_before(step))
    total = max(1, int(rows.sum()))
    return [
        {
            "source": name,
            "store": store,
            "rows": int(read[number]),
            "tokens": int(read[number]) * length,
            "skipped_rows": int(rows[number] - read[number]),
            "share": int(rows[number]) / total,
            "planned_share": float(planned[number]) / total,
            "epochs": int(rows[number]) / int(timeline.windows[number]),
        }
        for number, (name, store) in enumerate(timeline.keys)
    ]


def check_step(step: int, num_steps: int) -> None:
    """UserError for a step that the run does not have."""
    if not 0 <= step < num_steps:
        raise UserError(f"--step {step}: the run has steps 0 to {num_steps - 1}; nearest: {min(max(step, 0), num_steps - 1)}")
