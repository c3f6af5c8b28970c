"""Duplicates, exact and near, against sets of word tuples that know no hash."""

import json
import random
import re

import numpy as np
import pytest

from k2jax.data.text import dedup
from k2jax.data.text.prepare import prepare


def shingle_set(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a, b):
    a, b = shingle_set(a), shingle_set(b)
    return len(a & b) / len(a | b)


def corpus(rng):
    """3,000 distinct documents in families of six that share most sentences, and 300 near duplicates of some."""
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]

    def sentences(count):
        return [" ".join(rng.choices(words, k=12)).capitalize() + "." for _ in range(count)]

    distinct = []
    for _ in range(500):
        shared = sentences(17)
        distinct += (" ".join([*shared, *sentences(7)]) for _ in range(6))
    pairs = {}
    for number in rng.sample(range(3000), 300):
        changed = distinct[number].split()
        place, count = rng.randrange(20, len(changed) - 40), rng.randint(1, 10)
        changed[place : place + count] = [f"changed{n}" for n in range(count)]
        pairs[number] = " ".join(changed).upper() if rng.random() < 0.5 else "\n".join(changed)
    return distinct, pairs


def test_300_near_duplicates_go_and_3000_distinct_documents_stay(tmp_path):
    rng = random.Random(1)
    distinct, pairs = corpus(rng)
    similar = [jaccard(distinct[number], text) for number, text in pairs.items()]
    assert 0.9 <= min(similar) < 0.91 and len(pairs) == 300
    assert 0.5 < max(jaccard(distinct[i], distinct[i + 1]) for i in range(0, 3000, 6)) < 0.7
    entries = [(f"d{number}", text) for number, text in enumerate(distinct)]
    entries += [(f"p{number}", text) for number, text in pairs.items()]
    rng.shuffle(entries)
    for file in range(6):
        lines = "".join(json.dumps({"text": text}) + "\n" for _, text in entries[file::6])
        (tmp_path / f"{file}.jsonl").write_text(lines)
    summary = prepare(
        [f"{tmp_path}/{file}.jsonl" for file in range(6)], str(tmp_path / "out"), "byte", near_duplicates=0.8,
        rank_bytes=2**20,
    )  # fmt: skip
    names = [name for file in range(6) for name in [name for name, _ in entries[file::6]]]
    kept = set()
    for split in ("train", "validation"):
        for path in (tmp_path / "out" / split).rglob("documents.jsonl"):
            for line in path.read_text().splitlines():
                file, _, number = json.loads(line)["name"].partition(".jsonl:")
                kept.add(entries[int(file) :: 6][int(number) - 1][0])
    assert len(names) == len(set(names)) == 3300
    survivors = [number for number in pairs if {f"d{number}", f"p{number}"} <= kept]
    lost = [number for number in range(3000) if not {f"d{number}", f"p{number}"} & kept]
    assert survivors == [] and len(lost) <= 3
    assert [*summary["skipped"]] == ["near-duplicate"]
    assert summary["skipped"]["near-duplicate"]["count"] == 300 + len(lost)


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.95])
def test_the_share_of_equal_hashes_estimates_jaccard(similarity):
    rng, errors = random.Random(2), []
    for _ in range(200):
        common = round(2 * 200 * similarity / (1 + similarity))
        words = [f"w{rng.random()}" for _ in range(2 * 200 - common)]
        a, b = words[:200], words[:common] + words[200:]
        text_a, text_b = " ".join(a), " ".join(b)
        exact = jaccard(text_a, text_b)
        assert dedup.share_of_common_shingles(text_a, text_b) == exact
        errors.append((dedup.signature(text_a) == dedup.signature(text_b)).mean() - exact)
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.045


def brute_force(texts, threshold):
    """Kept numbers by comparing all with all, from the first on; chains of near duplicates are one group."""
    group = [*range(len(texts))]
    for i in range(len(texts)):
        for j in range(i):
            if jaccard(texts[i], texts[j]) >= threshold:
                low, high = sorted((group[i], group[j]))
                group = [low if g == high else g for g in group]
    return {i for i, g in enumerate(group) if g == i}


@pytest.mark.parametrize("num_ranks", [1, 2, 7])
@pytest.mark.parametrize("num_indexes", [1, 5])
def test_pairs_are_found_whatever_the_cut(tmp_path, num_indexes, num_ranks):
    rng = random.Random(3)
    base = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(300)) for _ in range(20)]
    texts = base + base[::3] + [" ".join([*text.split()[:-2], "x", "y"]) for text in base[::4]] + ["...", "!!!", ""]
    rng.shuffle(texts)
    folders, parts = [], np.array_split(np.arange(len(texts)), num_indexes)
    for number, part in enumerate(parts):
        folder = tmp_path / str(number)
        folder.mkdir()
        digests = np.array([np.frombuffer(hash_of(texts[i]), np.uint8) for i in part])
        dedup.write_index(folder, digests, np.array([dedup.signature(texts[i]) for i in part]))
        folders.append(folder)
    found = [dedup.find_pairs(folders, rank, num_ranks, 0.8) for rank in range(num_ranks)]
    exact, near = (np.concatenate(kind) for kind in zip(*found, strict=True))
    is_exact, is_near = dedup.resolve(len(texts), exact, near)
    first = {text: number for number, text in reversed([*enumerate(texts)])}
    assert {i for i in range(len(texts)) if is_exact[i]} == {i for i, text in enumerate(texts) if first[text] != i}
    wordless = {i for i, text in enumerate(texts) if text in ("...", "!!!", "")}
    others = [i for i in range(len(texts)) if i not in wordless]
    kept = {others[i] for i in brute_force([texts[i] for i in others], 0.8)} | wordless
    assert {i for i in range(len(texts)) if not is_exact[i] and not is_near[i]} == kept


def hash_of(text):
    import hashlib

    return hashlib.sha256(text.encode()).digest()


def test_many_different_documents_of_one_key():
    """Of one key, each kind stays once, however they are mixed."""
    values = np.repeat(np.arange(5)[:, None], 10, axis=1)[[0, 1, 0, 2, 1, 0, 3, 4, 4]]
    found = np.concatenate([*dedup._pairs(np.arange(10, 19), values, 1.0)])
    assert found.tolist() == [[10, 12], [10, 15], [11, 14], [17, 18]]


def test_words_of_any_script():
    assert dedup.WORD.findall("naïve don't x_1 漢字かな 한국어 ไทย") == [
        "naïve", "don", "t", "x_1", "漢", "字", "か", "な", "한국어", *"ไทย"
    ]  # fmt: skip
    a = "東京は日本の首都であり、世界でも有数の大都市である。" * 1
    assert jaccard(a, a) == 1 and (dedup.signature(a) == dedup.signature(a.replace("、", ""))).all()
    assert not dedup.signature("... !!!").any()
