"""A user's mistakes: one clear message, exit code 2, no traceback, nothing written."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from k2jax.cli.main import main
from k2jax.cli.overrides import load_config, read_overrides
from k2jax.data.store.reader import TokenStore
from k2jax.data.text.prepare import prepare
from k2jax.runs.folder import write_config

MICRO = str(Path(__file__).parents[1] / "train" / "micro.py")
ON_EIGHT = ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2")  # the test process has 8 devices


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(folder: Path, count: int = 40) -> str:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"document {number} " * 40)
    return str(folder)


def refusal(capsys, *arguments: str) -> str:
    """The message of a refused command."""
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    return output.err


def test_wrong_mesh_size(place, capsys):
    assert refusal(capsys, "train", MICRO, "--mesh.fsdp", "2", "--mesh.expert", "2") == (
        "k2jax train: 2 problems\n"
        "  mesh.fsdp = 2 * mesh.expert = 2: needs 4 devices, there are 8; "
        "change the axes, or on a CPU give --simulate 4\n"
        "  data.path: store: there is no such folder or file\n"
    )
    assert list(place.iterdir()) == []


def test_all_wrong_arguments_at_once(place, capsys):
    arguments = (
        "--mesh.exprt",
        "2",
        "--optim.momentum",
        "high",
        "--mesh.tensor=3",
        "--data.seed",
        "4.5",
        "--train.remat",
    )
    assert refusal(capsys, "train", MICRO, *arguments) == (
        "k2jax train: 7 problems\n"
        "  mesh.exprt: no such field; did you mean mesh.expert?\n"
        "  optim.momentum = 'high': must be a finite number\n"
        "  data.seed = '4.5': must be an integer\n"
        "  train.remat: needs a value, one of 'none', 'k2', 'k2-offload', 'layer', 'offload'\n"
        "  model.num_attention_heads = 4: must be a multiple of mesh.tensor = 3; nearest: 3 or 6\n"
        "  data.sequence_length = 32: must be a multiple of mesh.context * mesh.tensor = 3; nearest: 30 or 33\n"
        "  data.path: store: there is no such folder or file\n"
    )
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("config_is_sound", [True, False])
def test_mistakes_of_all_kinds_at_once(place, capsys, config_is_sound):
    """Of a field, the mesh, the devices' kernels, the stores, the run directory and the model to begin with."""
    (place / "run").mkdir()
    (place / "run" / "notes.txt").write_text("mine")
    options = ["--mesh.fsdp", "2", "--data.path", "a,b", "--train.init-from", "c", "--kernels.grouped-matmul", "tokamax"]
    options += [] if config_is_sound else ["--optim.momentum", "2.0", "--kernels.exchange", "rong"]
    error = refusal(capsys, "train", MICRO, *options)
    starts = [
        *([] if config_is_sound else ["kernels.exchange = 'rong': must be", "optim.momentum = 2.0: must be"]),
        "mesh.fsdp = 2: needs 2 devices, there are 8",
        "kernels.grouped_matmul = 'tokamax': has no kernel",
        "data.path: a: there is no", "data.path: b: there is no", "train.init_from: c: there is no",
        "run: is not a run directory (no config.json) and is not empty: notes.txt",
    ]  # fmt: skip
    lines = error.splitlines()[1:]
    assert len(lines) == len(starts) and all(any(line[2:].startswith(s) for s in starts) for line in lines), error
    assert [path.name for path in place.iterdir()] == ["run"]


def test_an_option_of_another_command_is_called_an_option(place, capsys):
    """`inspect` needs no devices, but who has just typed `train --simulate 8` types it there too."""
    assert refusal(capsys, "inspect", MICRO, "--simulate", "8", "--num-steps", "3", "--mesh", "2") == (
        "k2jax inspect: 3 problems\n"
        "  --simulate: is no option of this command; simulate: no such field; "
        "sections are model, optim, guard, phases, kernels, data, mixture, mesh, train, checkpoint, watchdog\n"
        "  --num-steps: is no option of this command; num_steps: no such field; did you mean train.num_steps?\n"
        "  mesh: is a section; give its fields, such as mesh.replica\n"
    )


def test_missing_folder(place, capsys):
    assert "store" in refusal(capsys, "train", MICRO, *ON_EIGHT)
    assert list(place.iterdir()) == []


def test_none_is_off_but_a_choice_where_it_is_one():
    """train.remat has a "none" of its own."""
    given = ["--train.remat", "none", "--optim.qk-clip-tau", "None", "--train.eval-every=none", "--data.path", "none"]
    values = {"train.remat": "none", "optim.qk_clip_tau": None, "train.eval_every": None, "data.path": "none"}
    assert read_overrides(given) == (values, [])


def test_lists_are_joined_by_commas(place, capsys):
    given = ["--phases.start-tokens", "0,7680", "--mixture.weights", "code=5 man=3,code=1 man=8"]
    values = {"phases.start_tokens": (0, 7680), "mixture.weights": ("code=5 man=3", "code=1 man=8")}
    assert read_overrides(given) == (values, [])
    arguments = ("--phases.start-tokens", "0", "7680", "--phases.rope", "plain yarn", "--data.fim-tokens", "1,x")
    assert read_overrides([*arguments])[1] == [
        "7680: stands alone; arguments are pairs --section.field value, the values of a list joined by commas",
        "phases.rope = 'plain yarn': must be a list, each one of 'plain', 'yarn', joined by commas",
        "data.fim_tokens = '1,x': must be a list, each an integer or None, joined by commas",
    ]
    assert main(["train", MICRO, "--help"]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "--phases.start-tokens INT[,INT ...]" in shown and "--phases.rope {plain,yarn}[,{plain,yarn} ...]" in shown
    assert "{None}|{INT[,INT ...]}" in shown


def test_an_option_given_twice_is_refused():
    given = ["--data.seed", "1", "--train.run-dir", "a", "--data.seed=2", "--train.run_dir", "a"]
    assert read_overrides(given)[1] == [
        "data.seed: given twice, as '1' and as '2'; give it once",
        "train.run_dir: given twice, as 'a' and as 'a'; give it once",
    ]


def test_config_files_that_are_none(place, capsys):
    (place / "empty.py").write_text("x = 1\n")
    (place / "broken.py").write_text("def config(:\n")
    assert "no such config file" in refusal(capsys, "train", "absent.py")
    assert "must define config()" in refusal(capsys, "train", "empty.py")
    assert "broken.py:1: SyntaxError: " in refusal(capsys, "train", "broken.py")


def test_empty_source(place, capsys):
    (place / "nothing").mkdir()
    message = refusal(capsys, "prepare", "nothing", "--out", "store", "--tokenizer", "byte")
    assert message.startswith("k2jax prepare: 1 problem\n  source = 'nothing': no document")
    assert sorted(p.name for p in place.iterdir()) == ["nothing"]


def test_store_of_another_tokenizer(place, capsys):
    """A vocabulary larger than the model's; and, on resume, a store other than the run's."""
    prepare(documents(place / "texts"), "store", "train:300")
    message = refusal(capsys, "train", MICRO, *ON_EIGHT)
    assert "model.vocab_size = 258: must be at least " in message and "'store'" in message
    assert sorted(p.name for p in place.iterdir()) == ["store", "texts"]


def test_nothing_is_written_over(place, capsys):
    source = documents(place / "texts")
    prepare(source, "store", "byte")
    before = {p: p.read_bytes() for p in Path("store").rglob("*") if p.is_file()}
    assert "exists already" in refusal(capsys, "prepare", source, "--out", "store", "--tokenizer", "byte")
    (place / "run").mkdir()
    (place / "run" / "notes.txt").write_text("mine")
    assert "is not a run directory (no config.json) and is not empty: notes.txt" in refusal(
        capsys, "train", MICRO, *ON_EIGHT
    )
    assert {p: p.read_bytes() for p in Path("store").rglob("*") if p.is_file()} == before
    assert [p.name for p in (place / "run").iterdir()] == ["notes.txt"]


def test_no_run_to_show(place, capsys):
    assert "absent: no such folder" in refusal(capsys, "plot", "absent", "--out", "x.png")
    assert list(place.iterdir()) == []


def test_a_folder_where_a_config_is_due(place, capsys):
    """inspect shows a run's own config, with options over it; train needs the file."""
    (place / "run").mkdir()
    assert "run: is not a run directory (no config.json)" in refusal(capsys, "inspect", "run")
    assert "run: is a folder, not a config file" in refusal(capsys, "train", "run")
    write_config(place / "run", load_config(MICRO))
    shown = []
    for source in (MICRO, "run"):
        for options in ((), ("--model.vocab-size", "300")):
            assert main(["inspect", source, "--json", *options]) == 0
            shown.append(capsys.readouterr().out)
    assert shown[:2] == shown[2:] and shown[0] != shown[1]
    assert "model.vocab_siz: no such field" in refusal(capsys, "inspect", "run", "--model.vocab-siz", "3")


def test_help_is_quick():
    """Best of three, in a process of its own: 0.5 s is the promise, here of CPU time, which other work does not add to."""

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        before = children()
        subprocess.run([sys.executable, "-m", "k2jax", "--help"], check=True, capture_output=True)
        times.append(children() - before)
    assert 0 < min(times) < 0.5


def test_values_out_of_range_are_refused(place, capsys):
    (place / "file").write_text("")
    assert "--simulate 0: must be at least 1" in refusal(capsys, "train", MICRO, "--simulate", "0")
    assert "train.seed = 4294967296: must be below 4294967296" in refusal(
        capsys, "train", MICRO, "--train.seed", "4294967296"
    )
    assert refusal(capsys, "generate", "run", "--temperature", "-1", "--tokens", "-5", "--seed", "-2") == (
        "k2jax generate: 3 problems\n"
        "  temperature = -1.0: must be a number of at least 0; 0 is greedy\n"
        "  tokens = -5: must be at least 0\n"
        "  seed = -2: must be at least 0 and below 2**32\n"
    )
    assert "must be a file name that ends in .png" in refusal(capsys, "plot", "run", "--out", "nowhere/x.png")


def test_a_run_directory_that_cannot_be_made(place, capsys):
    prepare(documents(place / "texts", 200), "store", "byte", validation_fraction=0.3)
    (place / "file").write_text("")
    arguments = ("train", MICRO, *ON_EIGHT, "--train.run-dir")
    assert "train.run_dir = 'file/run': cannot be made: " in refusal(capsys, *arguments, "file/run")


def test_options_before_or_after_a_list(place, capsys, monkeypatch):
    """argparse alone would refuse what comes after the options."""
    seen = []
    monkeypatch.setattr("k2jax.cli.model.generate", lambda args, rest: seen.append((args.prompt, args.tokens)) or 0)
    for arguments in (["a b", "c", "--tokens", "2"], ["--tokens", "2", "a b", "c"], ["a b", "--tokens", "2", "c"]):
        assert main(["generate", "run", *arguments]) == 0
    assert main(["generate", "run", "--tokens", "2"]) == 0
    assert seen == [(["a b", "c"], 2)] * 3 + [([""], 2)]
    with pytest.raises(SystemExit):
        main(["generate", "run", "--tokns", "2", "a"])
    documents(place / "a"), documents(place / "b")
    assert main(["prepare", "a=a", "--tokenizer", "byte", "--out", "store", "b=b"]) == 0
    assert main(["plot", "nothing", "--out", "x.png", "nowhere"]) == 2


def test_a_config_imports_the_file_beside_it_and_the_next_one_its_own(place, capsys):
    for folder, steps in (("one", 3), ("two", 4)):
        (place / folder).mkdir()
        (place / folder / "base.py").write_text(f"STEPS = {steps}")
        (place / folder / "child.py").write_text(
            "from base import STEPS\nfrom k2jax.config import Config, TrainConfig\n"
            "def config():\n    import base\n    return Config(train=TrainConfig(num_steps=base.STEPS))\n"
        )
    for folder, steps in (("one", 3), ("two", 4), ("one", 3)):
        assert load_config(f"{folder}/child.py").train.num_steps == steps
    assert "base" not in sys.modules and not any(path.startswith(str(place)) for path in sys.path)


def test_mistakes_in_a_config_file_name_the_line_and_the_field(place, capsys):
    head = "from k2jax.config import *\ndef config():\n    return "
    line, misspelled = "^  c.py:3: ", "no such field; did you mean"
    cases = {
        head + "Config(model=ModelConfig(hiden_size=3))": f"{line}model.hiden_size: {misspelled} model.hidden_size\\?",
        head + "ModelConfig(rope=RopeConfig(facto=3))": f"{line}model.rope.facto: {misspelled} model.rope.factor",
        head + "Config(modl=3)": f"{line}modl: {misspelled} model\\?",
        head + "Config().replace({'train.num_step': 3})": f"{line}train.num_step: {misspelled} train.num_steps\\?",
        head + "Config(model={'rope': 3}, mesh=8)": f"{line}model = .*\n{line[1:]}mesh = 8: must be a MeshConfig",
        head + "Config(train=TrainConfig(num_steps=0)).validate()": f"{line}train.num_steps = 0: must be greater",
        head + "1 / 0": f"{line}ZeroDivisionError: division by zero",
        head + ")": f"{line}SyntaxError: unmatched",
        "import nothing_of_that_name": "^  c.py:1: ModuleNotFoundError",
    }
    for text, rule in cases.items():
        (place / "c.py").write_text(text)
        assert re.search(rule, refusal(capsys, "train", "c.py"), re.MULTILINE), text


def test_paths_that_begin_with_a_tilde_or_go_up(place, capsys):
    error = refusal(capsys, "train", MICRO, "--train.run-dir", "~/x", "--data.path", "a,~/b")
    assert "train.run_dir = '~/x': must not begin with ~" in error and "data.path = 'a,~/b': must not begin" in error
    assert "nearest: '/" in error and list(place.iterdir()) == []
    source, inner = documents(place / "a"), place / "inner"
    prepare(source, str(place / "store"), "byte", validation_fraction=0.3)
    inner.mkdir()
    assert TokenStore(f"{inner}/../store").vocab_size == 258
