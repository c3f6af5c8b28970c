"""Parts by any number of workers make one store, whose bytes hang on the documents alone."""

import hashlib
import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from token_writer import TokenWriter, check_files, split_of

from k2jax.data.loader.corpus import open_corpus
from k2jax.data.store.manifest import CorruptStore
from k2jax.data.store.reader import TokenStore
from k2jax.data.store.writer import PartWriter, finished_part, merge_parts
from k2jax.data.tokenizer import load_tokenizer, train_bpe
from k2jax.errors import UserError
from k2jax.files import read_sealed, write_sealed
from k2jax.storage import Folder

SIZES = {"shard_tokens": 64, "chunk_tokens": 16}
DERIVED = {"web-rephrased": {"derived_from": "web", "variants": 2}}


def documents(part):
    """(split, source, name, text, origin), the same at every call."""
    draw = random.Random(part)
    for i in range(0 if part == 2 else 9):  # one part is empty
        source, text = draw.choice(["web", "code"]), "".join(draw.choices("abc é漢", k=draw.randrange(1, 90)))
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        yield split_of(sha256, 0.3), source, f"{part}/{i}", text, None
        for variant in range(2 if source == "web" else 0):
            origin = {"name": f"{part}/{i}", "sha256": sha256}
            yield split_of(sha256, 0.3), "web-rephrased", f"{part}/{i}-{variant}", f"{variant} {text[::-1]}", origin


def write_part(url, part, pause=0.0):
    writer = PartWriter(url, part, load_tokenizer("byte"), **SIZES)
    for split, source, name, text, origin in documents(part):
        writer.append(split, source, name, text, origin)
        time.sleep(pause)
    writer.finish()


def write(url, order, tokenizer=None):
    for part in order:
        write_part(str(url), part)
    return merge_parts(str(url), len(order), tokenizer or load_tokenizer("byte"), DERIVED, made_by="a test")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_streams_hold_the_documents_in_order_of_their_parts(tmp_path):
    write(tmp_path, range(4))
    store, tokenizer = TokenStore(tmp_path), load_tokenizer("byte")
    assert [*store.sources] == ["code", "web", "web-rephrased"] and store.sources["web-rephrased"]["variants"] == 2
    for split, source in itertools.product(("train", "validation"), store.sources):
        wanted = [d for part in range(4) for d in documents(part) if d[:2] == (split, source)]
        stream = store.streams[split][source]
        borders = stream.borders(0, len(wanted)).tolist()
        texts = [tokenizer.decode(stream.read(a, b)[1:-1]) for a, b in itertools.pairwise(borders)]
        assert texts == [text for *_, text, _ in wanted] and stream.num_documents == len(wanted) > 2
        assert stream.text_bytes == sum(len(text.encode()) for text in texts)
        records = stream.records(range(len(wanted)))
        assert [(r["name"], r.get("origin")) for r in records] == [(d[2], d[4]) for d in wanted]
        assert [r["sha256"] for r in records] == [hashlib.sha256(t.encode()).hexdigest() for t in texts]
        whole = np.concatenate([stream.read(a, b) for a, b in itertools.pairwise(borders)])
        for start in range(0, stream.num_tokens, 5):
            stop = min(start + 77, stream.num_tokens)
            assert np.array_equal(stream.read(start, stop), whole[start:stop])
            first, starts = stream.documents(start, stop)
            naive = [i for i in range(len(wanted)) if borders[i] < stop and borders[i + 1] > start]
            assert (first, starts.tolist()) == (naive[0], [borders[i] for i in naive])
        for i in range(len(wanted)):
            assert stream.borders(i, i + 1).tolist() == borders[i : i + 2]


def test_a_variant_is_on_the_side_of_its_origin_and_found_by_it(tmp_path):
    write(tmp_path, range(4))
    store, seen = TokenStore(tmp_path), 0
    for split in ("train", "validation"):
        originals, variants = store.streams[split]["web"], store.streams[split]["web-rephrased"]
        hashes = [record["sha256"] for record in originals.records(range(originals.num_documents))]
        for number, record in enumerate(variants.records(range(variants.num_documents))):
            assert record["origin"]["sha256"] in hashes
            assert number in [*variants.find(record["origin"]["sha256"])] and [*variants.find(record["sha256"])] == [
                number
            ]
            assert [*variants.find_name(record["name"])] == [number]
            seen += split_of(record["sha256"], 0.3) != split  # its own hash would say otherwise
    assert seen


def test_order_of_workers_and_place_change_no_byte(tmp_path):
    write(tmp_path / "a", range(4))
    write(tmp_path / "b", [2, 0, 3, 1])
    write("memory://store_writer/c/", [1, 0, 2, 3])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    far = Folder("memory://store_writer/c")
    assert {name: far.read(name) for name in far.names()} == contents(tmp_path / "a")


def test_kills_change_no_byte(tmp_path):
    write(tmp_path / "whole", range(4))
    (tmp_path / "killed").mkdir()
    code = "import sys; from test_writer import write_part; write_part(sys.argv[1], int(sys.argv[2]), 0.02)"
    path, kills = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]), 0
    for part in range(4):
        while finished_part(str(tmp_path / "killed"), part) is None:
            command = [sys.executable, "-c", code, str(tmp_path / "killed"), str(part)]
            worker = subprocess.Popen(command, cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": path})
            while kills < 3 and worker.poll() is None and not (tmp_path / "killed/train/web" / f"{part:05}").exists():
                time.sleep(0.002)
            if kills < 3 and worker.poll() is None:
                time.sleep(0.03 * kills)
                worker.kill()  # with a shard or two of its part written
                kills += 1
            assert worker.wait() in (0, -9)
    merge_parts(str(tmp_path / "killed"), 4, load_tokenizer("byte"), DERIVED, made_by="a test")
    assert kills and contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_store_at_a_url_is_read_and_checked(tmp_path):
    trained = train_bpe(iter(["abab ab"] * 9), 270)
    for url in (str(tmp_path / "local"), "memory://store_writer/url/"):
        writer = PartWriter(url, 0, trained, **SIZES)
        writer.append("train", "web", "a", "abab " * 100)
        writer.finish()
        merge_parts(url, 1, trained)
    near, far = TokenStore(tmp_path / "local"), TokenStore("memory://store_writer/url")
    assert near.digest == far.digest and far.tokenizer().decode(far.streams["train"]["web"].read(1, 5)).startswith(
        "abab"
    )
    a, b = (store.streams["train"]["web"] for store in (near, far))
    assert np.array_equal(a.read(0, a.num_tokens), b.read(0, b.num_tokens)) and b.num_tokens > 128
    folder = Folder("memory://store_writer/url")
    for name in near.manifest["files"]:
        content = folder.read(name)
        damaged = bytearray(content)
        damaged[len(damaged) // 2] ^= 8
        folder.write(name, bytes(damaged))
        with pytest.raises(CorruptStore, match=f"{name}: sha256 is"):
            store = TokenStore("memory://store_writer/url")
            stream = store.streams["train"]["web"]
            stream.read(0, stream.num_tokens), stream.documents(0, 1), stream.records([0]), store.tokenizer()
            check_files(store)
        folder.delete(name)
        with pytest.raises(CorruptStore, match=f"{name}: is missing"):
            TokenStore("memory://store_writer/url")
        folder.write(name, content)
    with pytest.raises(UserError, match="no manifest.json"):
        TokenStore("memory://store_writer/nothing")
    with pytest.raises(UserError, match="is not a folder that can be opened"):
        TokenStore("nowhere://store/")


def test_merge_names_what_is_wrong(tmp_path):
    for part in (0, 3):
        write_part(str(tmp_path), part)
    with pytest.raises(UserError, match="parts 1, 2, 4 have not been written"):
        merge_parts(str(tmp_path), 5, load_tokenizer("byte"), DERIVED)
    with pytest.raises(
        UserError, match="part 0: .*web-rephrased: of . documents . are rephrased ones; give them a source"
    ):
        merge_parts(str(tmp_path), 1, load_tokenizer("byte"))
    with pytest.raises(UserError, match="part 0: was written with another tokenizer"):
        merge_parts(str(tmp_path), 1, train_bpe(iter(["abab ab"] * 9), 270), DERIVED)
    receipt = read_sealed(tmp_path / "parts/00003.json")
    write_sealed(tmp_path / "parts/00001.json", receipt | {"part": 1, "chunk_tokens": 8})
    with pytest.raises(UserError, match=r"parts: were written with several \(shard_tokens, chunk_tokens\)"):
        merge_parts(str(tmp_path), 2, load_tokenizer("byte"), DERIVED)
    with pytest.raises(ValueError, match="must be one of"):
        PartWriter(tmp_path, 0, load_tokenizer("byte")).append("train", "a b", "name", "text")
    with pytest.raises(ValueError, match="has no tokens"):
        PartWriter(tmp_path, 0, load_tokenizer("byte")).append_tokens("train", "a", np.array([]), {"name": "x"})


def test_a_writer_of_many_documents_makes_parts(tmp_path):
    writer = TokenWriter(tmp_path / "many", load_tokenizer("byte"), part_tokens=100, **SIZES)
    texts = [f"text {i} " * i for i in range(1, 30)]
    for i, text in enumerate(texts):
        writer.append("train", str(i), text)
    manifest = writer.finish()
    assert len(manifest["sources"]["text"]["splits"]["train"]["parts"]) > 5
    stream = open_corpus(str(tmp_path / "many")).streams["train"]["text"]
    spans = itertools.pairwise(stream.borders(0, len(texts)).tolist())
    assert ["".join(map(chr, stream.read(a, b)[1:-1])) for a, b in spans] == texts
