"""Import, export, import: the same bits; the folder's other files; memory; crashes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file
from tiny_published import SHAPES, draw_tensors, write_checkpoint

from k2jax.data.saved_tokenizer import foreign_tokenizer, save_tokenizer
from k2jax.data.tokenizer import load_tokenizer, train_bpe
from k2jax.errors import UserError
from k2jax.interop.export import export_run
from k2jax.interop.hf import import_hf, open_published
from k2jax.interop.tokenizer_files import tokenizer_files
from k2jax.sharding.mesh import single_device_mesh

TEXTS = [
    "def main(x):\n    return {'a': 1}  # naïve café\r\n\r\n\t\t",
    "日本語のテキスト、漢字とかな。1234567 89 I'll we'Ve DON'T",
    "  \n \n\n   x   \u00a0 <|eos|> [EOS] \U0001f600\u200d\n",
    "",
]


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(params=sorted(SHAPES))
def checkpoint(request, tmp_path):
    config = SHAPES[request.param]
    tensors = draw_tensors(config)
    return config, tensors, write_checkpoint(tmp_path / "hf", config, tensors)


def test_import_export_import_is_bit_equal(checkpoint, tmp_path, mesh_of):
    """Through a run of eight devices too: the files are compared with what was drawn, by the safetensors library."""
    config, tensors, folder = checkpoint
    meshes = {"one": single_device_mesh()}
    if config["num_attention_heads"] % 2 == 0 and (config["q_lora_rank"] or 2) % 2 == 0:
        meshes["eight"] = mesh_of(fsdp=2, expert=2, tensor=2)
    for name, mesh in meshes.items():
        run, out = tmp_path / f"run_{name}", tmp_path / f"out_{name}"
        import_hf(folder, run, mesh)
        export_run(run, out, dtype="f32", file_bytes=30_000)
        found = stored_tensors(out)
        assert len(list(out.glob("*.safetensors"))) > 3
        assert found.keys() == tensors.keys()
        for tensor, value in tensors.items():
            assert found[tensor].dtype == np.float32 and np.array_equal(found[tensor], value), tensor
        again = open_published(out)
        assert (again.model, again.rope) == (open_published(folder).model, open_published(folder).rope)
    index = json.loads((tmp_path / "out_one" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())


def test_bf16_rounds_and_keeps_the_bias(checkpoint, tmp_path):
    import ml_dtypes

    _, tensors, folder = checkpoint
    import_hf(folder, tmp_path / "run", single_device_mesh())
    export_run(tmp_path / "run", tmp_path / "out")
    for name, value in stored_tensors(tmp_path / "out").items():
        wanted = tensors[name] if "bias" in name else tensors[name].astype(ml_dtypes.bfloat16)
        assert value.dtype == wanted.dtype and np.array_equal(value, wanted), name


@pytest.fixture
def run(tmp_path):
    config = SHAPES["k2"]
    import_hf(write_checkpoint(tmp_path / "hf", config, draw_tensors(config)), tmp_path / "run", single_device_mesh())
    return tmp_path / "run"


def test_config_json_speaks_to_all_readers(run, tmp_path):
    """known-traps: transformers reads rope_parameters, mlx-lm rope_theta and rope_scaling; neither may guess."""
    export_run(run, tmp_path / "yarn")
    export_run(run, tmp_path / "plain", rope="plain")
    yarn, plain = (json.loads((tmp_path / k / "config.json").read_text()) for k in ("yarn", "plain"))
    scaling = SHAPES["k2"]["rope_scaling"]
    assert yarn["rope_theta"] == yarn["rope_parameters"]["rope_theta"] == 50000.0
    assert yarn["rope_scaling"] == scaling
    assert yarn["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 50000.0} | {
        k: v for k, v in scaling.items() if k != "type"
    }
    assert yarn["model_type"] == "deepseek_v3" and yarn["num_nextn_predict_layers"] == 0
    assert yarn["max_position_embeddings"] == 2048
    assert plain["rope_scaling"] is None and plain["rope_parameters"]["rope_type"] == "default"
    same = [k for k in SHAPES["k2"] if k not in ("model_type", "bos_token_id", "eos_token_id", "torch_dtype")]
    assert {k: yarn[k] for k in same} == {k: SHAPES["k2"][k] for k in same}


def test_refusals(run, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken: exists"):
        export_run(run, tmp_path / "taken")
    for url in ("gs://bucket/out", Path("gs://bucket/out")):  # the command line's, and Python's
        with pytest.raises(UserError, match="^--to 'gs:/+bucket/out': must be a folder, not a URL"):
            export_run(run, url)
    with pytest.raises(UserError, match="--step 7: is not a committed step; there are 0"):
        export_run(run, tmp_path / "out", step=7)
    with pytest.raises(UserError, match="hf2: no such folder"):
        export_run(tmp_path / "hf2", tmp_path / "out")
    data = max((run / "checkpoints" / "0" / "model").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="is not what was written"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.exporting").exists()


def test_failed_export_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("k2jax.interop.export.write_atomic", full)
    with pytest.raises(UserError, match="out: cannot be written: No space left"):
        export_run(run, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_leftovers_of_a_killed_export_are_replaced(run, tmp_path):
    (tmp_path / "out.exporting").mkdir()
    (tmp_path / "out.exporting" / "model-00001-of-00009.safetensors").write_text("half")
    with pytest.raises(UserError, match="out.exporting: is in the way and not ours"):
        export_run(run, tmp_path / "out")
    assert (tmp_path / "out.exporting" / "model-00001-of-00009.safetensors").read_text() == "half"
    (tmp_path / "out.exporting" / ".k2jax").touch()  # as a killed export leaves it
    export_run(run, tmp_path / "out")
    assert not (tmp_path / "out.exporting").exists()
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


PEAK = """
import resource, sys
import jax
jax.config.update("jax_platforms", "cpu")
from k2jax.interop.export import export_run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_run(sys.argv[1], sys.argv[2], dtype="f32")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.grid
def test_memory_is_bounded(tmp_path):
    """The largest stacked tensor has 268 MB, the model twice of that and more; the bound is three times one of them.

    Exporting tensor by tensor, with the chunk of the checkpoint that it lies in, takes far less than even one.
    """
    width, experts = 2048, 16
    config = SHAPES["moonlight"] | {
        "hidden_size": 1024,
        "moe_intermediate_size": width,
        "n_routed_experts": experts,
        "num_hidden_layers": 3,
    }
    stacked = 2 * experts * 1024 * width * 4
    import_hf(write_checkpoint(tmp_path / "hf", config, draw_tensors(config)), tmp_path / "run", single_device_mesh())
    command = [sys.executable, "-c", PEAK, str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) > 3 * stacked
    assert grown < stacked, f"{grown / 1e6:.0f} MB for stacks of {stacked / 1e6:.0f} MB"


def kimi_file(tmp_path):
    """A tiktoken file of our own making: all bytes, then some merges, in Kimi's format."""
    import base64

    tokens = [bytes([b]) for b in range(256)]
    tokens += [
        b"in",
        b"  ",
        b"re",
        b"re" + b"t",
        b"    ",
        b"in" + b"t",
        "日本".encode()[:3],
        "日本".encode()[:2],
        b"ret" + b"urn",
    ]
    tokens += [b"ur", b"urn", b"'l", b"'ll", b"12", b"123"]
    lines = [base64.b64encode(token).decode() + f" {rank}" for rank, token in enumerate(tokens)]
    path = tmp_path / "made.tiktoken"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["byte", "trained", "tiktoken"])
def test_exported_tokenizer_gives_the_same_ids(kind, tmp_path):
    """By the tokenizers library alone; texts with Han, contractions, runs of space, names of specials."""
    if kind == "byte":
        own = load_tokenizer("byte")
    elif kind == "trained":
        own = train_bpe(iter(TEXTS * 20), 300)
    else:
        own = load_tokenizer(str(kimi_file(tmp_path)))
    files = tokenizer_files(own)
    model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    stream = np.random.RandomState(0)
    random_texts = ["".join(stream.choice(list("inretu 123'l\n日本é"), 40)) for _ in range(200)]
    for text in [*TEXTS, *random_texts]:
        plain = text.replace("<|eos|>", "").replace("[EOS]", "")  # other libraries read names of specials as specials
        ids = model.encode(plain, add_special_tokens=False).ids
        assert ids == own.encode(plain).tolist()
        assert model.decode(ids, skip_special_tokens=False) == plain
    assert model.token_to_id(own.specials[own.eos]) == own.eos
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"]) == (own.specials[own.bos], own.specials[own.eos])
    assert ("tiktoken.model" in files) == (kind == "tiktoken")


def test_tokenizer_goes_with_the_model(tmp_path):
    """tiktoken.model in, tiktoken.model out, the same bytes; ids of bos and eos in config.json."""
    config = SHAPES["k2"] | {"vocab_size": 640, "bos_token_id": 271, "eos_token_id": 272}
    folder = write_checkpoint(tmp_path / "hf", config, draw_tensors(config))
    (folder / "tiktoken.model").write_bytes(kimi_file(tmp_path).read_bytes())
    import_hf(folder, tmp_path / "run", single_device_mesh())
    export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "tiktoken.model").read_bytes() == (folder / "tiktoken.model").read_bytes()
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (271, 272)


def test_foreign_tokenizer_is_passed_on(tmp_path):
    """Another model's tokenizer.json, with specials of its own names."""
    own = load_tokenizer("byte")
    definition = tokenizer_files(own)["tokenizer.json"].replace(b"<|eos|>", b"</s>")
    foreign = foreign_tokenizer(definition, own.bos, own.eos)
    save_tokenizer(foreign, tmp_path / "kept")
    assert tokenizer_files(foreign)["tokenizer.json"] == definition
    assert json.loads(tokenizer_files(foreign)["tokenizer_config.json"])["eos_token"] == "</s>"


KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
from k2jax.interop.export import export_run
left = int(sys.argv[3])

def count(event, arguments):
    global left
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and sys.argv[2] in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
export_run(sys.argv[1], sys.argv[2], dtype="f32", file_bytes=40_000)
print(int(sys.argv[3]) - left)
"""


@pytest.mark.grid
def test_killed_export_is_not_there_or_whole(run, tmp_path):
    """SIGKILL at file operations from the first to the last; the next export finds nothing in its way."""
    out = tmp_path / "out"

    def export(moment):
        command = [sys.executable, "-c", KILLED, str(run), str(out), str(moment)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = export(10**6)
    assert done.returncode == 0, done.stderr
    total, whole = int(done.stdout), stored_tensors(out)
    shutil.rmtree(out)
    for moment in (1, 2, total // 2, total - 2, total - 1, total):
        assert export(moment).returncode == -9
        assert not out.exists() or stored_tensors(out).keys() == whole.keys()
        if out.exists():
            shutil.rmtree(out)
    assert export(10**6).returncode == 0
    assert all(np.array_equal(value, whole[name]) for name, value in stored_tensors(out).items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out", "run"]
