"""Runs at s3:// and gs://: small files in a mirror, records that one of two writers commits, and the lock."""

import contextlib
import json
import re
import threading
import time

import pytest

from k2jax.config import Config
from k2jax.errors import RunFailed, UserError
from k2jax.files import read_sealed
from k2jax.runs import bucket_lock, mirror
from k2jax.runs.bucket_lock import hold
from k2jax.runs.commits import (
    arrays_of,
    commit,
    committed_steps,
    damage,
    read_record,
    remove_leftovers,
    remove_step,
    set_aside,
)
from k2jax.runs.folder import write_config
from k2jax.runs.identity import make_identity
from k2jax.runs.mirror import Mirror, hold_run, join_run, open_run_folder, run_folder, upload
from k2jax.storage import Folder


@pytest.fixture(params=["s3", "gs"])
def url(request, tmp_path):
    request.getfixturevalue({"s3": "s3", "gs": "gcs"}[request.param])
    (tmp_path / "bucket").mkdir()
    return f"{request.param}://bucket/runs/a"


@pytest.fixture
def disk(tmp_path):
    """The run's objects, as the server keeps them."""
    return tmp_path / "bucket/runs/a"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(bucket_lock, "SILENT_SECONDS", 1.5)


def elsewhere(monkeypatch):
    """As in another process, or on another machine: no mirror is there."""
    monkeypatch.setattr(mirror, "_mirrors", {})


def begin(url):
    """A run, as its first start leaves it."""
    files = open_run_folder(url)
    write_config(files.path, Config())
    make_identity(files.path)
    upload(files.path)
    return files


def save(files, step, text=b"12345678"):
    """Commit a step with one object; the run is held."""
    found = mirror.mirror_of(files.path)
    record = {"step": step, "folder": f"{step}-{found.writer}", "data_position": {}, "holds": ["model"], "content": {}}
    arrays = found.folder(arrays_of(files.checkpoints, record))
    arrays.write("model/w/c/0", text)
    commit(files.checkpoints, record | {"files": {"model/w/c/0": arrays.describe("model/w/c/0")["sha256"]}})


def held(url):
    files = begin(url)
    lock = hold_run(files.path)
    join_run(files.path, lock.__enter__())
    return files, lock


def test_small_files_and_records_are_seen_elsewhere(url, disk, monkeypatch):
    files, lock = held(url)
    files.metrics.write_text("one\n")
    files.tensorboard.mkdir()
    (files.tensorboard / "events").write_text("e")
    (files.path / "compiled").mkdir()
    (files.path / "compiled/program").write_text("no file of a run")
    save(files, 4)
    assert (disk / "metrics.jsonl").read_text() == "one\n" and (disk / "tb/events").read_text() == "e"
    assert not (disk / "compiled").exists() and read_sealed(disk / "checkpoints/4.json")["writer"]["pid"]
    files.metrics.write_text("one\ntwo\n")
    save(files, 8)
    lock.__exit__(None, None, None)
    elsewhere(monkeypatch)
    other = open_run_folder(url)
    assert other.path != files.path and other.metrics.read_text() == "one\ntwo\n" and not other.tensorboard.exists()
    assert committed_steps(other.checkpoints) == [4, 8] and damage(other.checkpoints, 8) == []
    (disk / "metrics.jsonl").write_text("three\n")
    (disk / "checkpoints/4.json").unlink()
    assert open_run_folder(url).metrics.read_text() == "three\n" and committed_steps(other.checkpoints) == [8]


def test_records_come_before_the_commit_record_and_only_what_changed(url, request):
    asked = request.getfixturevalue({"s3": "s3", "gs": "gcs"}[url[:2]])
    files, lock = held(url)
    files.metrics.write_text("one\n")
    files.ledger.write_text("row\n")
    asked.clear()
    save(files, 4)
    written = [key.removeprefix("runs/a/") for method, _, key, *_ in asked if method in ("PUT", "POST")]
    written = [name for name in written if name != "lock"]
    assert written == [written[0], "metrics.jsonl", "ledger.jsonl", "checkpoints/4.json"] and written[0].startswith("arrays/4-")
    asked.clear()
    save(files, 8)
    names = {key.removeprefix("runs/a/") for method, _, key, *_ in asked if method in ("PUT", "POST")} - {"lock"}
    assert {name.split("/")[0] for name in names} == {"arrays", "checkpoints"}
    lock.__exit__(None, None, None)


def test_of_two_writers_of_a_record_one_wins(url):
    for number in range(5):
        mirrors, won, lost = [Mirror(url) for _ in range(4)], [], []

        def write(one):
            text = json.dumps({"writer": {"pid": id(one), "host": "here"}})
            try:
                one.commit(one.path / f"checkpoints/{number}.json", text)
                won.append(text)
            except RunFailed as error:
                lost.append(str(error))

        threads = [threading.Thread(target=write, args=(one,)) for one in mirrors]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        there = Folder(url).read(f"checkpoints/{number}.json").decode()
        assert won == [there] and len(lost) == 3, (won, lost)
        winner = f"process {json.loads(there)['writer']['pid']} on here has committed this step"
        assert all(f"checkpoints/{number}.json: {winner}" in message for message in lost)


def test_a_flipped_bit_and_a_lost_object_are_named(url, disk):
    files, lock = held(url)
    save(files, 4)
    (path,) = (disk / "arrays").glob("4-*/model/w/c/0")
    content = bytearray(path.read_bytes())
    content[3] ^= 16
    path.write_bytes(content)
    name = path.relative_to(disk).as_posix()
    assert damage(files.checkpoints, 4) == [f"{url}/{name}: is not what was written (sha256)"]
    path.unlink()
    assert damage(files.checkpoints, 4) == [f"{url}/{name}: is missing"]
    lock.__exit__(None, None, None)


def test_steps_are_removed_set_aside_and_leftovers_go(url, disk):
    files, lock = held(url)
    for step in (0, 4, 8, 12, 16):
        save(files, step)
    remove_step(files.checkpoints, 0)
    set_aside(files.checkpoints, [12], ["it is damaged"])
    Folder(url).delete("checkpoints/16.json")  # as if killed before it was written
    lock.__exit__(None, None, None)
    files = open_run_folder(url)
    (left,) = remove_leftovers(files.checkpoints)
    assert re.fullmatch("16-[0-9a-f]{16}", left)
    assert committed_steps(files.checkpoints) == [4, 8] and committed_steps(files.damaged) == [12]
    assert sorted(p.name for p in (disk / "checkpoints").iterdir()) == ["4.json", "8.json"]
    assert sorted(p.name.split("-")[0] for p in (disk / "arrays").iterdir() if any(p.rglob("0"))) == ["12", "4", "8"]
    assert (disk / "damaged/12.json").is_file()


def test_a_record_of_another_folder_is_refused(url, disk):
    files, lock = held(url)
    save(files, 4)
    lock.__exit__(None, None, None)
    from k2jax.files import write_sealed

    record = read_sealed(disk / "checkpoints/4.json")
    write_sealed(disk / "checkpoints/4.json", record | {"folder": "../../else"})
    open_run_folder(url)
    with pytest.raises(UserError, match="its folder is '../../else', must be 4-WRITER"):
        read_record(files.checkpoints, 4)


def test_a_lock_that_lives_is_respected(url, capfd):
    bucket = Folder(url)
    with hold(bucket, "lock") as lock:
        time.sleep(0.5)
        with pytest.raises(UserError, match=f"^{url}: in use by process {lock.holder['pid']} on .*; wait for it or give another"):
            hold(bucket, "lock").__enter__()
        lock.renew()
        assert "watching for up to 1.5 s whether it lives" in capfd.readouterr().err
    with hold(bucket, "lock"):  # given back: at once
        assert capfd.readouterr().err == ""


def test_a_lock_that_stands_still_is_taken_over_and_its_holder_commits_nothing(url, disk, monkeypatch):
    files, lock = held(url)
    slow = mirror.mirror_of(files.path)
    slow.lock._ended.set()  # its machine stands still
    elsewhere(monkeypatch)
    with hold(Folder(url), "lock") as taken:
        files.metrics.write_text("of the slow one\n")
        monkeypatch.setattr(mirror, "_mirrors", {url: slow})
        with pytest.raises(RunFailed, match=f"^{url}: was taken over by process {taken.holder['pid']} on .*commits nothing more"):
            save(files, 4)
        assert not (disk / "checkpoints").exists() and not (disk / "metrics.jsonl").exists()
        taken.renew()
        lock.__exit__(None, None, None)  # gives nothing back that it does not hold
        taken.renew()


def test_one_of_many_takes_a_lock(url):
    bucket, got, lost, held = Folder(url), [], [], contextlib.ExitStack()

    def take():
        try:
            got.append(held.enter_context(hold(bucket, "lock")))
        except UserError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    held.close()
    assert len(got) == 1 and len(lost) == 5


@pytest.mark.parametrize("place", ["gs://bucket", "s3://", "ftp://host/run", "s3://bucket/a b", "s3://bucket/../a", "gs://bucket/r?x=1"])
def test_urls_at_which_no_run_can_be(place):
    with pytest.raises(UserError, match=re.escape(f"{place}: must be gs://BUCKET/NAME or s3://BUCKET/NAME, of letters")):
        run_folder(place)


def test_what_does_not_answer_is_the_users_to_mend(url):
    with pytest.raises(UserError, match="private"):
        open_run_folder(url.replace("bucket", "private"))


def test_a_bucket_that_can_be_read_and_not_listed_is_no_new_run(url, disk):
    begin(url)
    disk.parents[1].rename(disk.parents[1].with_name("unlisted"))
    with pytest.raises(UserError, match="unlisted/runs/a/?: (PERMISSION_DENIED|its files cannot be listed)"):
        open_run_folder(url.replace("bucket", "unlisted"))
