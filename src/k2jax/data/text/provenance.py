"""Sources that rephrase others, found from the origins that their documents carry."""

from pathlib import Path

import numpy as np

from k2jax.data.text.job import read_result
from k2jax.data.text.readers import Record
from k2jax.errors import UserError
from k2jax.files import write_sealed


class Origins:
    """The origins that the documents of one rank name, by source."""

    def __init__(self):
        self.sources = {}

    def add(self, source: str, record: Record) -> None:
        entry = self.sources.setdefault(source, {"documents": 0, "from": {}, "ids": []})
        entry["documents"] += 1
        if record.origin:
            origin = record.origin["source"]
            entry["from"][origin] = entry["from"].get(origin, 0) + 1
            entry["ids"].append(int(record.origin["sha256"][:16], 16))

    def save(self, folder: Path) -> None:
        for number, entry in enumerate(self.sources.values()):
            np.save(folder / f"origins-{number}.npy", np.array(entry.pop("ids"), np.uint64))
        write_sealed(folder / "origins.json", {"sources": self.sources})


def rephrased_sources(folders: list[Path]) -> dict[str, dict]:
    """{source: {"derived_from", "variants"}} of the sources that are rephrasings, for the manifest.

    UserError if a source mixes them with other documents, or is made from several.
    """
    totals = {}
    for folder in folders:
        for number, (source, entry) in enumerate(read_result(folder / "origins.json")["sources"].items()):
            total = totals.setdefault(source, {"documents": 0, "from": {}, "ids": []})
            total["documents"] += entry["documents"]
            for origin, count in entry["from"].items():
                total["from"][origin] = total["from"].get(origin, 0) + count
            total["ids"].append(np.load(folder / f"origins-{number}.npy"))
    problems, found = [], {}
    for source, total in totals.items():
        count = sum(total["from"].values())
        if count not in (0, total["documents"]):
            rule = f"{count} of {total['documents']} documents are rephrased"
            problems.append(f"source {source!r}: {rule}; give them a source of their own, as {source}-rephrased=PATH")
        elif len(total["from"]) > 1:
            rule = f"is rephrased from {', '.join(sorted(total['from']))}"
            problems.append(f"source {source!r}: {rule}; give the variants of each a source of their own")
        elif count:
            _, repeats = np.unique(np.concatenate(total["ids"]), return_counts=True)
            found[source] = {"derived_from": [*total["from"]][0], "variants": int(repeats.max())}
    if problems:
        raise UserError(*problems)
    return found
