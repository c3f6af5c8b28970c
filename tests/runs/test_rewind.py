"""A run taken back to an earlier step: what is after it is kept aside, and its data is not read again unasked."""

import micro
import pytest

from k2jax.cli.main import main
from k2jax.config import Config
from k2jax.errors import UserError
from k2jax.runs import commits
from k2jax.runs.folder import RunFolder, lock_run, write_config
from k2jax.runs.identity import make_identity
from k2jax.runs.records import read_records, to_line
from k2jax.runs.rewind import rewind, skip_problems


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """Steps 4, 8 and 12 of a run without arrays, of 16 rows a step; the data is 3 steps ahead from step 4 on."""
    files = RunFolder(tmp_path / "run")
    files.checkpoints.mkdir(parents=True)
    write_config(files.path, micro.config())
    make_identity(files.path)
    for step in (4, 8, 12):
        (files.checkpoints / str(step)).mkdir()
        position = {"next_row": 16 * (step + 3)}
        commits.commit(files.checkpoints, {"step": step, "holds": [], "files": {}, "content": {}, "data_position": position})
    files.metrics.write_text("".join(to_line({"step": step, "loss": 1.0}) for step in range(13)))
    return files


def with_skips(*skips: str) -> Config:
    return micro.config().replace({"data.skip_steps": skips or None})


def test_what_comes_after_is_aside(run):
    before = run.metrics.read_bytes()
    done = rewind(str(run.path), 4, ("7-8", "9-11"))
    assert (done.step, done.newest, done.skip) == (4, 12, ("7-11",))
    assert commits.committed_steps(run.checkpoints) == [4] and commits.committed_steps(done.aside) == [8, 12]
    assert (done.aside / "8").is_dir() and (done.aside / "metrics.jsonl").read_bytes() == before
    assert [record["step"] for record in read_records(run.metrics)] == [0, 1, 2, 3]
    assert commits.newest_step(run.checkpoints) == 4


def test_its_data_is_left_out_or_refused(run):
    rewind(str(run.path), 8, ("11-12",))
    rewind(str(run.path), 4, ("20-20",))
    assert skip_problems(run, with_skips("11-12", "20-20")) == skip_problems(run, with_skips("11-25")) == []
    assert skip_problems(run, with_skips()) == [
        "data.skip_steps = None: the run was rewound to leave out more; give data.skip_steps = ('11-12', '20-20')"
    ]
    assert skip_problems(run, with_skips("12-20")) == [
        "data.skip_steps = ('12-20',): the run was rewound to leave out more; give data.skip_steps = ('11-20',)"
    ]
    assert sorted(path.name for path in run.rewound.iterdir()) == ["4-2", "8-1"]


def test_without_skips_nothing_is_demanded(run):
    assert rewind(str(run.path), 8).skip == () and skip_problems(run, with_skips()) == []


def test_all_that_is_wrong_at_once(run):
    with pytest.raises(UserError) as caught:
        rewind(str(run.path), 5, ("7-6", "4-9"))
    assert caught.value.problems == (
        "--to 5: is not a committed step; there are 4, 8 and 12",
        "--skip 7-6: must be FIRST-LAST, two steps that rise, such as '1200-1219'",
        "--skip 4-9: must begin at step 5 of the data, which is next at --to 5, or later",
    )
    with pytest.raises(UserError, match="--to 12: is the newest committed step already"):
        rewind(str(run.path), 12)
    with pytest.raises(UserError, match="must begin at step 11 of the data, which is next at --to 8"):
        rewind(str(run.path), 8, ("9-12",))
    assert not run.rewound.exists() and not run.rewinds.exists() and len(commits.committed_steps(run.checkpoints)) == 3


def test_a_damaged_step_and_a_run_that_goes_on_are_left_alone(run):
    with lock_run(run.path), pytest.raises(UserError, match="in use by process"):
        rewind(str(run.path), 4)
    (run.checkpoints / "4.json").write_text("{}")
    with pytest.raises(UserError, match="4.json"):
        rewind(str(run.path), 4)
    assert len(commits.committed_steps(run.checkpoints)) == 3


@pytest.mark.parametrize("crash", range(4))
def test_killed_in_between_it_is_a_run_that_can_go_on(run, monkeypatch, crash):
    """After any of its moves the steps that are left are whole, and the skip is demanded."""
    moves, real = [], type(run.path).rename

    def rename(self, to):
        if len(moves) == crash:
            raise KeyboardInterrupt
        moves.append(self)
        return real(self, to)

    monkeypatch.setattr(type(run.path), "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        rewind(str(run.path), 4, ("7-8",))
    steps = commits.committed_steps(run.checkpoints)
    assert steps == [4, 8, 12][: 3 - (crash + 1) // 2] and all(commits.read_record(run.checkpoints, step) for step in steps)
    assert len(skip_problems(run, with_skips())) == 1 and len(read_records(run.metrics)) == 13


def test_command(run, capsys):
    assert main(["rewind", str(run.path), "--to", "4", "--skip", "8-9,12-12"]) == 0
    told = capsys.readouterr().out
    assert "rewound from step 12 to step 4" in told and "--data.skip-steps 8-9,12-12" in told
    assert main(["rewind", str(run.path), "--to", "8"]) == 2
    assert "--to 8: is not a committed step; there are 4" in capsys.readouterr().err
