"""`k2jax launch`: its arguments, what it writes and to whom, and two real k2jax processes on this machine."""

import argparse
import configparser
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from k2jax.cli.main import _parser, main
from k2jax.launch.local import free_port
from k2jax.launch.manifest import command_problems

ROOT = Path(__file__).parents[2]
JOBSET = ("launch", "jobset", "--hosts", "2", "--image", "k2jax:1", "--devices-per-host", "1", "--run-dir", "gs://b/r",
          "--unchecked")  # fmt: skip


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command of k2jax."""
    actions = _parser()._actions
    return next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH of this folder alone."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def recorder(program: Path, code: int) -> Path:
    """A program that keeps its arguments and stdin, and exits with `code`."""
    kept = program.with_suffix(".kept")
    keep = f"open({str(kept)!r}, 'w').write(' '.join(sys.argv[1:]) + '\\n' + sys.stdin.read())"
    script = f"import sys\n{keep}\nsys.exit({code})"
    program.write_text(f"#!{sys.executable}\n{script}\n")
    program.chmod(0o755)
    return kept


def test_two_processes_of_k2jax(capfd, tmp_path, monkeypatch):
    """Both refuse a config that is not there, at once; the launcher ends with their exit code."""
    started = time.monotonic()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    assert (
        main(["launch", "local", "-n", "2", "--log-dir", "logs", "--", "train", "missing.py", "--mesh.fsdp", "2"]) == 2
    )
    out, err = capfd.readouterr()
    assert time.monotonic() - started < 10
    for index in range(2):
        lines = [line for line in out.splitlines() if line.startswith(f"[{index}] ")]
        assert lines[0] == f"[{index}] k2jax train: 1 problem" and "missing.py" in lines[1]
        assert Path("logs", f"rank-{index}.log").read_text().splitlines() == [line[4:] for line in lines]
    assert re.match(
        r"k2jax launch: process [01] failed first, with exit code 2 after [\d.]+ s; its last lines:\n\[", err
    )


@pytest.mark.parametrize("broken", [0, 1])
def test_a_config_that_one_process_alone_has_not_ends_all_with_its_words(tmp_path, broken):
    """It fails before it joins; the others, which wait for it in the roll call, would wait for minutes."""
    (tmp_path / "c.py").write_text("from k2jax.config import Config\ndef config():\n    return Config()\n")
    address = f"127.0.0.1:{free_port()}"
    started, running = time.monotonic(), []
    for index in range(3):
        options = ["--coordinator", address, "--num-processes", "3", "--process-id", str(index), "--simulate", "1"]
        argv = [sys.executable, "-m", "k2jax", "train", "absent.py" if index == broken else "c.py", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        running.append(subprocess.Popen(argv, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2, 2] and time.monotonic() - started < 20
    assert errors[broken].startswith("k2jax train: 1 problem\n  absent.py: no such config file\n")
    name = rf"k2jax train: \d problems?\n  process {broken} on .* \(pid {running[broken].pid}\): absent.py: no such config file\n"
    assert all(re.search(name, text) for index, text in enumerate(errors) if index != broken), errors


@pytest.mark.parametrize("command", sorted(subcommands()))
def test_what_joins_other_processes_can_be_launched(command):
    joins = command == "train" or "--coordinator" in subcommands()[command].format_help()  # train's help is its own
    assert joins == (not command_problems([command]))


def test_two_processes_of_another_command(capfd, tmp_path, monkeypatch):
    """Both come as far as the run that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    options = ("-n", "2", "--devices-per-process", "1")
    assert main(["launch", "local", *options, "--", "eval", "missing", "--mesh.expert", "2"]) == 2
    out, _ = capfd.readouterr()
    assert "[0] process 0 of 2" in out and "[1] process 1 of 2" in out and "missing: no such folder" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("local", "-n", "0", "--devices-per-process", "-1", "--", "trian", "c.py", "--mesh.fsdp", "2"),
            "k2jax launch: 3 problems\n"
            "  -n 0: must be at least 1\n"
            "  --devices-per-process -1: must be at least 1\n"
            "  -- trian: must be a command that runs in several processes: train, generate, eval; "
            "did you mean train?\n",
        ),
        (
            ("local", "-n", "2"),
            "k2jax launch: 1 problem\n  no command: give one after --, such as -- train configs/tiny.py\n",
        ),
        (
            ("local", "-n", "2", "--"),
            "k2jax launch: 1 problem\n  no command: give one after --, such as -- train configs/tiny.py\n",
        ),
        (
            ("slurm", "--hosts", "0", "--time", "soon", "--", "export", "x"),
            "k2jax launch: 3 problems\n"
            "  -- export: must be a command that runs in several processes: train, generate, eval\n"
            "  --hosts 0: must be at least 1\n"
            "  --time 'soon': must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00 or 2-12\n",
        ),
        (
            ("slurm", "--hosts", "2", "--run-dir", "runs/x", "--", "eval", "runs/x", "--mesh.expert", "2"),
            "k2jax launch: 1 problem\n"
            "  --run-dir runs/x: is train's alone; eval is given its run directory as an argument\n",
        ),
    ],
)
def test_mistakes_start_nothing(capsys, arguments, message):
    assert main(["launch", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == message


def test_a_config_is_checked_before_a_job_is_written(capsys, tmp_path, monkeypatch):
    """With the job's own mistakes, and with its options over it; or, if it is only where the job runs, not at all."""
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text("from k2jax.config import Config\ndef config():\n    return Config()\n")
    slurm = ["launch", "slurm", "--hosts", "2", "--", "train"]
    assert main([*slurm, "c.py", "--simulate", "4", "--change-mixture", "--mesh.tensor", "2"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    wrong = ["launch", "slurm", "--hosts", "0", "--run-dir", "~/r", "--", "train", "c.py", "--mesh.tensor", "3", "--x", "1"]
    assert main(wrong) == 2
    captured = capsys.readouterr()
    found = [line.split(":")[0] for line in captured.err.splitlines()[1:]]
    fields = ["train.run_dir = '~/r'", "model.num_attention_heads = 64", "model.vocab_size = 163840", "data.sequence_length = 4096"]
    assert captured.out == "" and found[:2] == ["  --hosts 0", "  --x"] and {*found[2:]} <= {f"  {name}" for name in fields}
    for place in (["slurm"], [*JOBSET[1:-1]]):
        job = ["launch", *place, *(["--hosts", "2"] if place == ["slurm"] else [])]
        for path in ("absent.py", "/app/absent.py"):
            assert main([*job, "--", "train", path]) == 2
            assert f"{path}: no such config file" in (error := capsys.readouterr().err) and "give --unchecked" in error
            assert main([*job, "--unchecked", "--", "train", path]) == 0
    assert main([*slurm]) == 2 and "-- train: has no CONFIG" in capsys.readouterr().err


def test_options_of_the_command_need_the_two_hyphens(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["launch", "local", "-n", "2", "train", "c.py", "--mesh.fsdp", "2"])
    assert "unrecognized arguments: --mesh.fsdp" in capsys.readouterr().err


def test_all_after_the_hyphens_is_the_commands(capsys):
    slurm = ["launch", "slurm", "--hosts", "2", "--unchecked"]
    assert main([*slurm, "--", "train", "c.py", "--hosts", "9", "-n", "--out", "x"]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n" in out and "    k2jax launch host -- train c.py --hosts 9 -n --out x\n" in out


def test_to_stdout_or_a_file(capsys, tmp_path):
    assert main([*JOBSET, "--", "train", "c.py"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["kind"] == "JobSet"
    assert main([*JOBSET, "--out", str(tmp_path / "job.yaml"), "--", "train", "c.py"]) == 0
    assert capsys.readouterr().out == "" and (tmp_path / "job.yaml").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "program", "given"),
    [
        (("launch", "slurm", "--hosts", "1", "--unchecked"), "sbatch", "\n#!/bin/bash\n"),
        (JOBSET, "kubectl", "apply -f -\n# Written by"),
    ],
)
def test_submit(capfd, programs, arguments, program, given):
    assert main([*arguments, "--submit", "--", "train", "c.py"]) == 2
    assert f"--submit: {program} is not on PATH" in capfd.readouterr().err
    kept = recorder(programs / program, 7)
    assert main([*arguments, "--", "train", "c.py"]) == 0 and not kept.exists()  # writing alone runs nothing
    assert main([*arguments, "--submit", "--", "train", "c.py"]) == 7
    assert kept.read_text().startswith(given)


def test_nothing_is_written_if_it_cannot_be_submitted(programs, tmp_path):
    assert main([*JOBSET, "--submit", "--out", str(tmp_path / "job.yaml"), "--", "train", "c.py"]) == 2
    assert not (tmp_path / "job.yaml").exists()


def test_a_pipe_gets_each_line_when_it_is_written():
    """Or the log of a run would be hours behind."""
    show = "import atexit, sys; atexit.register(lambda: print(sys.stdout.line_buffering, file=sys.stderr))"
    code = f"{show}; sys.argv = ['k2jax', '--help']; from k2jax.cli.main import entry; entry()"
    environment = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "True\n")


def test_templates_are_packaged():
    """setuptools leaves out what is no Python unless setup.cfg names it."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    packaged = {
        Path(package.replace(".", os.sep), name)
        for package, names in parser["options.package_data"].items()
        for name in names.split()
    }
    source = ROOT / "src"
    files = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    assert packaged == {p for p in files if p.suffix not in (".py", ".pyc") and "egg-info" not in str(p)}
