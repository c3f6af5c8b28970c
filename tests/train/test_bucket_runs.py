"""Runs in a bucket, as their users start them: the same bits as on a disk, and every command reads them by their URL."""

import json
import os

import bucket_server
import many
import micro
import pytest

from k2jax.cli.main import main
from k2jax.inference.load import load_run
from k2jax.runs.records import read_records
from k2jax.train.metrics import WALL_CLOCK

pytestmark = pytest.mark.grid
MESH = "--mesh.expert", "4", "--optim.ns-dtype", "float32"


def started(folder, run_dir, count, devices, *arguments, event="none"):
    options = ["--train.run-dir", run_dir, "--train.compile-cache", str(folder / "compiled"), "--train.self-check", "off"]
    return many.train(folder, count, devices, *options, *MESH, *arguments, event=event)


def records(run_dir):  # a start validates at its own last step
    return [{k: v for k, v in record.items() if k not in (*WALL_CLOCK, "validation_bits_per_byte")} for record in read_records(run_dir / "metrics.jsonl")]


def content(run_dir, step):
    return json.loads((run_dir / f"checkpoints/{step}.json").read_text())["content"]


def test_two_processes_and_then_one(tmp_path, gcs, monkeypatch, capfd):
    monkeypatch.setattr(bucket_server, "PAGE", 1000)  # thousands of objects, and a listing looks at all for each page
    monkeypatch.setattr(many, "ENVIRONMENT", many.ENVIRONMENT | dict(os.environ))
    monkeypatch.chdir(tmp_path)
    micro.make_store(tmp_path)
    (tmp_path / "bucket").mkdir()
    url, disk = "gs://bucket/runs/a", tmp_path / "bucket/runs/a"

    ended = started(tmp_path, url, 2, 2, "--train.num-steps", "6", "--train.log-ranks", "True")
    assert ended.codes == [0, 0], "\n".join(ended.outputs)
    assert f"checkpoints: {url}/checkpoints" in ended.outputs[0] and "step 6/6" in (disk / "ranks/1.log").read_text()
    assert not [*disk.glob(".write-test*")] and json.loads((disk / "lock").read_text())["released"]
    ended = started(tmp_path, url, 2, 2, "--train.num-steps", "400", event="raise:1:7")  # after the save at step 6
    assert ended.codes == [1, 1] and "as the test wants it" in (disk / "ranks/1.failed").read_text()
    assert json.loads((disk / "lock").read_text())["released"]
    ended = started(tmp_path, url, 1, 4, "--train.num-steps", "9")
    assert ended.codes == [0], "\n".join(ended.outputs)
    ended = started(tmp_path, "local", 1, 4, "--train.num-steps", "9")
    assert records(disk) == records(tmp_path / "local") and content(disk, 9) == content(tmp_path / "local", 9)
    assert (disk / "curves.png").stat().st_size and (disk / "sample.txt").stat().st_size and [*(disk / "tb").iterdir()]

    config = str(many.HERE / "micro.py")
    assert load_run(url).state.step == 9
    for command in (["verify", url], ["inspect", url, "--json"], ["audit", url, "--tokens"], ["plot", url, "--out", "a.png"],
                    ["export", url, "--to", "exported"]):  # fmt: skip
        assert main(command) == 0, command
    assert "step 9: sound" in capfd.readouterr().out
    assert main(["train", config, "--train.run-dir", url, "--train.seed", "5"]) == 2
    assert f"train.seed: the run in {url} has 0, now given 5" in capfd.readouterr().err
    assert main(["verify", "gs://bucket/none"]) == 2 and main(["generate", "ftp://host/run", "x"]) == 2
