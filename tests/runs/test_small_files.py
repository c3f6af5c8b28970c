"""Every small file of a run: whatever becomes of its content, it is refused by name, or its values are as written."""

import errno
import json
import os
import random
import re
import socket

import pytest

from k2jax.config import Config
from k2jax.data.loader.segments import read_segments, write_segments
from k2jax.data.saved_tokenizer import open_tokenizer, save_tokenizer
from k2jax.data.store.writer import PartWriter, finished_part
from k2jax.data.tokenizer import load_tokenizer, train_bpe
from k2jax.errors import UserError
from k2jax.files import locked, naming, read_json, write_atomic, write_sealed
from k2jax.runs.commits import committed_steps, damage, held_parts, newest_step, not_ours, remove_leftovers
from k2jax.runs.folder import RunFolder, lock_run, path_problem, read_config, write_config
from k2jax.runs.records import RecordFile, read_records

RECORD = {
    "step": 4,
    "holds": ["model", "optimizer"],
    "files": {},
    "content": {},
    "run": None,
    "data_position": {"row": 12},
}
DEEP = b"[" * 100_000
OTHERS = [b"", b"null", b"[]", b"[1]", b"3", b'"x"', b"{}", DEEP, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe{}", b"NaN",
          b'{"sha256": "0"}', b'{"sha256": 3}', b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1e999}', b"\x00" * 9]  # fmt: skip


def write_tokenizer(folder):
    save_tokenizer(train_bpe(iter(["the ferry left the pier"] * 9), 300), folder)


def write_commit(folder):
    (folder / "4").mkdir()
    write_sealed(folder / "4.json", RECORD)


def write_metrics(folder):
    file = RecordFile(folder / "metrics.jsonl", 0)
    for step in range(3):
        file.write({"step": step, "loss": 2.5 - step, "loss_hex": "0x1p+1", "clipped": ["L0H1"]})
    file.close()


def write_receipt(folder):
    writer = PartWriter(str(folder / "store"), 0, load_tokenizer("byte"), shard_tokens=64, chunk_tokens=16)
    writer.append("train", "web", "a.txt", "the ferry left the pier")
    writer.finish()


FILES = {
    "config.json": (lambda folder: write_config(folder, Config()), read_config),
    "timeline.json": (
        lambda folder: write_segments(RunFolder(folder).timeline, [{"from_step": 0, "path": "a"}]),
        lambda folder: read_segments(RunFolder(folder).timeline),
    ),
    "tokenizer_info.json": (write_tokenizer, lambda folder: open_tokenizer(folder).digest),
    "tokenizer.json": (write_tokenizer, lambda folder: open_tokenizer(folder).digest),
    "4.json": (write_commit, lambda folder: (held_parts(folder, 4), refuse(damage(folder, 4)))),
    "store/parts/00000.json": (write_receipt, lambda folder: finished_part(str(folder / "store"), 0)),
    "metrics.jsonl": (write_metrics, lambda folder: read_records(folder / "metrics.jsonl")),
}


def refuse(problems):
    if problems:
        raise UserError(*problems)


def outcome(read, folder):
    try:
        return read(folder)
    except UserError as error:
        assert str(folder) in str(error) and error.problems
        return None


@pytest.mark.parametrize("name", FILES)
def test_no_change_is_believed(tmp_path, name):
    write, read = FILES[name]
    write(tmp_path)
    path, draw = tmp_path / name, random.Random(name)
    content, good = path.read_bytes(), read(tmp_path)
    flips = [(i, bit) for i in range(len(content)) for bit in range(8)]
    changed = [content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :]
               for i, bit in (flips if len(flips) < 9000 else draw.sample(flips, 1000))]  # fmt: skip
    for _ in range(2000 if name != "tokenizer.json" else 200):
        start, size = draw.randrange(len(content)), draw.choice([0, 1, 1, 2, 5, 40])
        changed.append(content[:start] + draw.randbytes(draw.choice([0, 1, 3])) + content[start + size :])
    refused = 0
    for number, damaged in enumerate([*OTHERS, *changed]):
        path.write_bytes(damaged)
        found = outcome(read, tmp_path)
        # Cut at the end of a line, or a last line without its end: what a crash leaves of a file that is appended to.
        cut = name == "metrics.jsonl" and found is not None and found == good[: len(found)]
        assert found is None or found == good or cut, (number, damaged[:200])
        refused += found is None
    assert refused > 0.8 * len(changed)


@pytest.mark.parametrize("name", [name for name in FILES if "store/" not in name])  # a store may be a bucket's
def test_what_is_not_a_file_of_ours(tmp_path, name):
    write, read = FILES[name]
    write(tmp_path)
    path, kept = tmp_path / name, tmp_path / "elsewhere"
    path.rename(kept)
    if name != "metrics.jsonl":  # appended to, and made by a user's own hand at times
        path.symlink_to(kept)
        with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
            read(tmp_path)
        path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name}: is not a regular file"):
        read(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=name):
        read(tmp_path)


def test_a_file_too_large_to_be_ours(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(UserError, match="x.json: is larger than 64 MiB"):
        read_json(tmp_path / "x.json")


def test_writing_follows_no_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "x.json.tmp").symlink_to(tmp_path / "victim")
    write_atomic(tmp_path / "x.json", "new")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "x.json").read_text() == "new"


def test_a_record_of_another_step_is_refused(tmp_path):
    write_commit(tmp_path)
    (tmp_path / "4.json").rename(tmp_path / "8.json")
    assert damage(tmp_path, 8) == [f"{tmp_path}/8.json: is the record of step 4; give it its name back"]


def test_what_a_save_did_not_make_stays(tmp_path):
    """Copies, notes and links beside the checkpoints; unfinished saves go."""
    write_commit(tmp_path)
    for name in ("4.good", "best", "lost+found", "8", "8.orbax-checkpoint-tmp", "0009", "٣"):
        (tmp_path / name).mkdir()
    for name in ("4.good.json", "NOTES.txt", "12.json.tmp", "best.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "latest").symlink_to("4")
    (tmp_path / "16").symlink_to("4")
    assert committed_steps(tmp_path) == [4] == [newest_step(tmp_path)]
    assert remove_leftovers(tmp_path) == ["12.json.tmp", "8", "8.orbax-checkpoint-tmp"]
    kept = {"4.good", "4.good.json", "best", "best.json", "lost+found", "NOTES.txt", "latest", "16", "0009", "٣"}
    assert {entry.name for entry in tmp_path.iterdir()} == kept | {"4", "4.json"} and {*not_ours(tmp_path)} == kept
    (tmp_path / "4.json").unlink()
    with pytest.raises(UserError, match="holds 4 but no commit record"):
        newest_step(tmp_path)
    (tmp_path / "4").rmdir()
    assert newest_step(tmp_path) is None


def test_paths_that_checkpoints_cannot_be_read_below(tmp_path):
    assert path_problem(tmp_path / "lr=1e-2 {a} ä % # & ]") is None
    for mark in "[\\*?":
        assert f"must not have {mark}, " in path_problem(tmp_path / f"a{mark}b" / "run")


def test_lines_in_another_order(tmp_path):
    write_metrics(tmp_path)
    path = tmp_path / "metrics.jsonl"
    a, b, c = path.read_text().splitlines(keepends=True)
    for lines in ([b, a, c], [a, a, b, c], [a, c, b]):
        path.write_text("".join(lines))
        with pytest.raises(UserError, match=r"metrics.jsonl:[23]: repeats or precedes the line before"):
            read_records(path)


def test_a_full_disk_is_named(tmp_path):
    """The error of a write itself names no file."""
    file = RecordFile(tmp_path / "metrics.jsonl", 0)
    file._file.close()
    file._file = open("/dev/full", "a")
    for write in (lambda: file.write({"step": 0}), file.close):
        with pytest.raises(OSError, match="No space left on device: '.*metrics.jsonl'"):
            write()
    with pytest.raises(OSError, match="No space left on device: '.*config.json'"), naming(tmp_path / "config.json"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_lock_has_one_owner(tmp_path):
    with lock_run(tmp_path):
        name = f"{os.getpid()} on {socket.gethostname()}"
        assert re.fullmatch(rf"{name}\n[0-9a-f]{{16}}\n", (tmp_path / "lock").read_text())
        with pytest.raises(UserError, match=f"in use by process {name}; wait for it"), lock_run(tmp_path):
            pass
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="lock: is a symbolic link, which a run never makes; remove it"), lock_run(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "lock").unlink()
    with locked(tmp_path, os.O_RDONLY) as first, locked(tmp_path, os.O_RDONLY) as second:
        assert first is not None and second is None
    with lock_run(tmp_path):
        pass


def test_a_run_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="train.run_dir = .*: cannot be written: Is a directory; make it writable"):
        with lock_run(tmp_path):
            pass


def test_the_byte_tokenizer_needs_no_file(tmp_path):
    save_tokenizer(load_tokenizer("byte"), tmp_path)
    assert json.loads((tmp_path / "tokenizer_info.json").read_text())["file"] is None
    assert open_tokenizer(tmp_path).encode("ab").tolist() == [97, 98]
