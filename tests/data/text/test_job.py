"""Files of a preparation under way that have changed: named, never believed, and never the end of the other results."""

import json
import shutil

import pytest

from k2jax.data.text import executors, tasks
from k2jax.data.text.job import read_report, read_result
from k2jax.data.text.prepare import prepare
from k2jax.data.text.progress import costs_of
from k2jax.errors import RunFailed, UserError
from k2jax.files import write_sealed

OPTIONS = {"tokenizer": "byte", "validation_fraction": 0.3, "rank_bytes": 300}
GARBAGE = {
    "empty": b"", "null": b"null", "list": b"[]", "number": b"5", "cut": b'{"skipped": {', "deep": b"[" * 100_000,
    "huge": b'{"n": %s}' % (b"9" * 9000), "utf-16": "{}".encode("utf-16"), "object": b"{}",
    "infinite": b'{"n": Infinity}', "seal": b'{"sha256": 5}', "other": b'{"skipped": {}, "bad": {}, "sha256": "%s"}' % (b"0" * 64),
}  # fmt: skip


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A preparation that was interrupted before its last task: (its call, its work folder)."""
    lines = [json.dumps({"text": f"note {i} of the harbour"}) for i in range(40)]
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines[number::4]))

    def call():
        return prepare([str(tmp_path / f"{number}.jsonl") for number in range(4)], str(tmp_path / "out"), **OPTIONS)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(tasks._TASKS, "merge", interrupt)
        call()
    return call, tmp_path / ".out.k2jax-partial"


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_garbage_in_place_of_a_result(tmp_path, content):
    path = tmp_path / "00000/tally.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(RunFailed) as error:
        read_result(path)
    assert str(error.value).startswith(f"{path}: ") and read_report(path) is None
    assert str(error.value).endswith(f"; remove {path.parent} and repeat the same command")


def test_no_bit_of_a_result_changes_unseen(tmp_path):
    path, values = tmp_path / "tally.json", {"skipped": {"empty": {"count": 3, "examples": ["a:1"]}}, "bad": {}}
    write_sealed(path, values)
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 3):  # 3 and 8 have no divisor in common: every bit of a byte has its turn
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert read_report(path) in (None, values)  # a space may become another one
    path.unlink()
    with pytest.raises(RunFailed, match="tally.json: is missing; remove"):
        read_result(path)


@pytest.mark.parametrize("name", ["read/00001/tally.json", "tokenizer/00000/spec.json", "resolve/00000/rephrased.json",
                                  "read/00002/origins.json"])  # fmt: skip
def test_a_damaged_result_is_named_and_made_again(begun, tmp_path, name):
    call, work = begun
    shutil.copytree(work, tmp_path / "copy")
    expected = call()["digest"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "copy").rename(work)
    path = work / name
    path.write_bytes(path.read_bytes().replace(b"{", b"[", 1))
    if "origins" in name:  # read by a rank that is done
        shutil.rmtree(work / "resolve")
    with pytest.raises(RunFailed, match=f"{name}: .*; remove {path.parent} and repeat the same command"):
        call()
    assert (work / "write/00003").is_dir()
    shutil.rmtree(path.parent)
    assert call()["digest"] == expected


def test_garbage_in_place_of_the_recipe(begun):
    call, work = begun
    for content in GARBAGE.values():
        (work / "recipe.json").write_bytes(content)
        with pytest.raises(UserError, match=f"{work}/recipe.json: .*; remove {work} to start again"):
            call()
        assert (work / "write/00003").is_dir()


def test_damaged_reports_cost_figures_and_no_store(begun, tmp_path):
    call, work = begun
    for number, content in enumerate(GARBAGE.values()):
        (work / f"progress/read-{number % 3:05d}.json").write_bytes(content)
        assert costs_of(work)["read"]["unreadable"] == min(number + 1, 3)
    assert costs_of(work)["read"]["documents"] == 10 and "unreadable" not in costs_of(work)["write"]
    assert call()["tasks"]["read"]["unreadable"] == 3


def test_a_damaged_manifest_does_not_become_a_store(begun, tmp_path, monkeypatch):
    call, work = begun
    real = tasks._TASKS["merge"]

    def damage(recipe, work, *rest):
        real(recipe, work, *rest)
        (work / "store/manifest.json").write_text("[")

    monkeypatch.setitem(tasks._TASKS, "merge", damage)
    with pytest.raises(UserError, match="store/manifest.json: is not JSON"):
        call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_damaged_report_of_a_failure(tmp_path, content):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors/merge-00000.json").write_bytes(content)
    error = executors._failure(tmp_path, "merge", [0], ValueError("a bug"))
    assert type(error) is RunFailed and "first 0: ValueError: a bug; more in" in str(error)
