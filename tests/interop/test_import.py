"""Refusals, in one message that names every problem; what is accepted; nothing is left behind."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_published import SHAPES, draw_tensors, write_checkpoint

import k2jax
from k2jax import load_hf
from k2jax.cli.main import main
from k2jax.data.text.prepare import prepare
from k2jax.errors import UserError
from k2jax.inference.load import load_run
from k2jax.interop.hf import import_hf, open_published
from k2jax.interop.hf_config import hf_config
from k2jax.sharding.mesh import single_device_mesh

K2 = SHAPES["k2"]
NAMES = {
    "first": "model.layers.1.mlp.experts.3.up_proj.weight",
    "second": "model.layers.2.self_attn.kv_b_proj.weight",
}


@pytest.fixture
def tensors():
    return draw_tensors(K2)


def write(tmp_path, tensors, config=K2, **options):
    return write_checkpoint(tmp_path / "hf", config, tensors, **options)


def problems_of(tmp_path, capsys, folder):
    """The problems of a refused import, by the command line; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    assert main(["import", str(folder), "--to", str(tmp_path / "run")]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    assert sorted(tmp_path.rglob("*")) == before
    first, *problems = output.err.splitlines()
    assert first == f"k2jax import: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return [problem.strip() for problem in problems]


def test_all_wrong_tensors_at_once(tmp_path, capsys, tensors):
    """Renamed (one missing, one unknown), transposed, misshaped, of a wrong dtype, FP8 without scales."""
    first, second = NAMES["first"], NAMES["second"]
    tensors["model.layers.1.mlp.experts.3.up.weight"] = tensors.pop(first)
    tensors[second] = np.ascontiguousarray(tensors[second].T)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(
        ml_dtypes.float8_e4m3fn
    )
    assert sorted(problems_of(tmp_path, capsys, write(tmp_path, tensors))) == sorted(
        [
            f"{first}: is missing, [16, 32]",
            "model.layers.1.mlp.experts.3.up.weight: no weight of this network has that name",
            f"{second}: has shape [16, 80], must have [80, 16]; it is transposed",
            "model.norm.weight: has shape [31], must have [32]",
            "lm_head.weight: is I32, must be F32 or BF16 or F16 (F8_E4M3 needs its scales)",
            "model.layers.0.mlp.up_proj.weight: is F8_E4M3, must be F32 or BF16 or F16 (F8_E4M3 needs its scales)",
        ]
    )


def test_truncated_and_foreign_files(tmp_path, capsys, tensors):
    folder = write(tmp_path, tensors, num_files=3)
    cut, text, _ = sorted(folder.glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-100])
    text.write_text("not a safetensors file, though it is long enough to have a header")
    found = problems_of(tmp_path, capsys, folder)
    assert len(found) == 2
    assert found[0].startswith(f"{cut}: is not a whole safetensors file: ") and "not fully covered" in found[0]
    assert found[1].startswith(f"{text}: is not a whole safetensors file: ")


def test_missing_file_and_stray_file(tmp_path, capsys, tensors):
    folder = write(tmp_path, tensors, num_files=2)
    first, _ = sorted(folder.glob("*.safetensors"))
    first.rename(folder / "other.safetensors")
    assert problems_of(tmp_path, capsys, folder) == [
        f"{folder}/other.safetensors: is not named in model.safetensors.index.json; remove it",
        f"{first}: is missing",
    ]


def test_symbolic_link(tmp_path, capsys, tensors):
    folder = write(tmp_path, tensors)
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert problems_of(tmp_path, capsys, folder) == [
        f"{folder}/model.safetensors: is a symbolic link to {tmp_path}/elsewhere.safetensors; put the file itself there"
    ]


def test_links_of_the_hub_cache_are_followed(tmp_path, tensors):
    """snapshots/REVISION/FILE -> ../../blobs/HASH is how downloads lie on the disk."""
    folder = write_checkpoint(tmp_path / "models--a--b" / "snapshots" / "abc", K2, tensors)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    shutil.move(folder / "model.safetensors", blobs / "0123")
    (folder / "model.safetensors").symlink_to(os.path.relpath(blobs / "0123", folder))
    assert len(open_published(folder).tensors) == len(tensors)


def test_index_that_lies(tmp_path, capsys, tensors):
    folder = write(tmp_path, tensors, num_files=2)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    files = sorted(set(values["weight_map"].values()))
    right = values["weight_map"]["lm_head.weight"]
    wrong = next(file for file in files if file != right)
    values["weight_map"]["lm_head.weight"] = wrong
    values["weight_map"]["ghost.weight"] = files[0]
    index.write_text(json.dumps(values))
    found = problems_of(tmp_path, capsys, folder)
    assert f"lm_head.weight: is in {folder / right}, the index says {wrong}" in found
    assert f"ghost.weight: the index says {folder / files[0]}, which does not hold it" in found
    index.write_text("{")
    assert problems_of(tmp_path, capsys, folder)[0].startswith(f"{index}: is not JSON")


def test_no_checkpoint(tmp_path, capsys):
    assert problems_of(tmp_path, capsys, tmp_path / "absent") == [f"{tmp_path}/absent: no such folder"]
    (tmp_path / "empty").mkdir()
    assert problems_of(tmp_path, capsys, tmp_path / "empty") == [f"{tmp_path}/empty: has no config.json"]
    (tmp_path / "empty" / "config.json").write_text(json.dumps(K2))
    assert problems_of(tmp_path, capsys, tmp_path / "empty") == [f"{tmp_path}/empty: has no .safetensors file"]


def test_all_wrong_config_fields_at_once(tmp_path, capsys, tensors):
    config = K2 | {
        "model_type": "llama",
        "scoring_func": "softmax",
        "hidden_act": "gelu",
        "num_key_value_heads": 2,
        "hidden_size": None,
        "topk_group": 2,
        "rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 64},
    }
    assert problems_of(tmp_path, capsys, write(tmp_path, tensors, config)) == [
        "config.json: rope type 'linear': must be 'yarn' or 'default'",
        "config.json: model_type = 'llama': must be one of 'deepseek_v3', 'kimi_k2'",
        "config.json: scoring_func = 'softmax': must be 'sigmoid', the network of k2jax has no other form",
        "config.json: hidden_act = 'gelu': must be 'silu', the network of k2jax has no other form",
        "config.json: num_key_value_heads = 2: must be 4, as MLA has",
        "config.json: hidden_size: is missing",
        "config.json: topk_group = 2: must be at most model.n_group = 1",
    ]


def test_multi_token_prediction_is_left_out_only_when_asked(tmp_path, tensors):
    tensors["model.layers.3.enorm.weight"] = np.ones(32, np.float32)
    folder = write(tmp_path, tensors, K2 | {"num_nextn_predict_layers": 1})
    with pytest.raises(
        UserError, match="1 tensors of layer 3, after the 3 of config.json, are for multi-token prediction"
    ):
        open_published(folder)
    assert "model.layers.3.enorm.weight" not in open_published(folder, drop_mtp=True).tensors


def test_stale_rotary_buffers_are_ignored_by_name(tmp_path, tensors):
    known = open_published(write_checkpoint(tmp_path / "clean", K2, tensors))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert open_published(write_checkpoint(tmp_path / "stale", K2, tensors)).model == known.model


def test_newer_rope_parameters_mean_the_same(tmp_path, tensors):
    """transformers 5 writes rope_parameters alone; where both stand they must agree."""
    scaling = K2["rope_scaling"]
    newer = {"rope_type": "yarn", "rope_theta": 50000.0} | {k: v for k, v in scaling.items() if k != "type"}
    old = open_published(write_checkpoint(tmp_path / "old", K2, tensors))
    config = {k: v for k, v in K2.items() if not k.startswith("rope_")} | {"rope_parameters": newer}
    new = open_published(write_checkpoint(tmp_path / "new", config, tensors))
    assert (new.model, new.rope) == (old.model, old.rope) and new.rope == "yarn"
    both = K2 | {"rope_parameters": newer | {"factor": 16.0}}
    with pytest.raises(UserError, match="rope_scaling has factor = 32.0, rope_parameters has 16.0; must be the same"):
        open_published(write_checkpoint(tmp_path / "both", both, tensors))


@pytest.fixture
def blocked(tensors):
    """(FP8 tensors with scales, the float32 values they stand for), with blocks of 8 x 8 that do not divide all."""
    stored, meant = {}, {}
    stream = np.random.RandomState(3)
    for name, value in tensors.items():
        if value.ndim != 2 or "embed" in name or "lm_head" in name or "gate.weight" in name:
            stored[name] = meant[name] = value
            continue
        rows, columns = (-(-n // 12) for n in value.shape)
        scale = (0.5 + stream.random_sample((rows, columns))).astype(np.float32)
        wide = np.zeros_like(value)
        low = np.zeros(value.shape, ml_dtypes.float8_e4m3fn)
        for i in range(value.shape[0]):  # entry by entry, as the formula says it
            for j in range(value.shape[1]):
                s = scale[i // 12, j // 12]
                low[i, j] = value[i, j] / s
                wide[i, j] = np.float32(low[i, j]) * s
        stored[name], stored[name + "_scale_inv"], meant[name] = low, scale, wide
    return stored, meant


def save_raw(folder, tensors):
    """safetensors' numpy side cannot write FP8 and name it in one go on all versions: write it through its bytes."""
    from k2jax.interop.safetensor_files import DTYPES, NewTensor, write_tensors

    words = {dtype: word for word, dtype in DTYPES.items()}
    (folder / "model.safetensors").unlink(missing_ok=True)
    write_tensors(folder, {n: NewTensor(v.shape, words[v.dtype], lambda v=v: v) for n, v in tensors.items()}, 10**9)


def test_block_fp8(tmp_path, blocked):
    stored, meant = blocked
    config = K2 | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [12, 12], "fmt": "e4m3"}}
    low = write_checkpoint(tmp_path / "fp8", config, meant)
    save_raw(low, stored)
    wide = write_checkpoint(tmp_path / "wide", K2, meant)
    assert any(t.dtype == "F8_E4M3" for t in open_published(low).tensors.values())
    for mesh_dtype in (jnp.float32, jnp.bfloat16):
        a, b = (jax.tree.leaves(jax.device_get(state(load_hf(f, dtype=mesh_dtype)))) for f in (low, wide))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    del stored[NAMES["second"] + "_scale_inv"]
    stored[NAMES["first"] + "_scale_inv"] = np.ones((1, 1), np.float32)
    save_raw(low, stored)
    with pytest.raises(UserError) as error:
        load_hf(low)
    assert sorted(error.value.problems) == [
        f"{NAMES['first']}_scale_inv: is F32 [1, 1], must be F32 or BF16 or F8_E8M0 [2, 3]",
        f"{NAMES['second']}: is F8_E4M3, must be F32 or BF16 or F16 (F8_E4M3 needs its scales)",
    ]


def state(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model))


def test_bf16_and_the_router_bias(tmp_path, tensors):
    """A bf16 checkpoint loads to the same bf16 values; the router bias keeps float32 whatever is asked."""
    low = {n: v if "bias" in n else v.astype(ml_dtypes.bfloat16) for n, v in tensors.items()}
    model = load_hf(write(tmp_path, low), dtype=jnp.bfloat16)
    gate = np.asarray(model.moe.ffn.gate[...][0, 3])
    np.testing.assert_array_equal(gate, low["model.layers.1.mlp.experts.3.gate_proj.weight"].T)
    bias = np.asarray(model.moe.ffn.bias[...])
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias[1], tensors["model.layers.2.mlp.gate.e_score_correction_bias"])


def test_mesh_that_does_not_fit(tmp_path, tensors, mesh_of):
    folder = write(tmp_path, tensors)
    with pytest.raises(UserError) as error:
        load_hf(folder, mesh=mesh_of(tensor=8))
    assert error.value.problems == ("model.num_attention_heads = 4: must be a multiple of mesh.tensor = 8; nearest: 8",)
    with pytest.raises(UserError, match="^mesh.stage = 2: must be 1 for a model to call"):
        load_hf(folder, mesh=mesh_of(stage=2))


def test_mesh_of_other_axes(tmp_path, tensors):
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(UserError, match="must have replica, stage, fsdp, expert, tensor, context"):
        load_hf(write(tmp_path, tensors), mesh=mesh)
    with pytest.raises(UserError, match="experts: is not a mesh axis"):
        k2jax.mesh_of(experts=8)


def test_import_refuses_to_overwrite(tmp_path, tensors):
    folder = write(tmp_path, tensors)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="run: exists"):
        import_hf(folder, tmp_path / "run", single_device_mesh())
    with pytest.raises(UserError, match="^--to 's3://bucket/run': must be a folder, not a URL"):
        import_hf(folder, "s3://bucket/run", single_device_mesh())


def test_import_that_fails_late_leaves_nothing(tmp_path, tensors, monkeypatch):
    folder = write(tmp_path, tensors)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("k2jax.interop.hf.write_config", full)
    with pytest.raises(UserError, match="run: cannot be written: No space left"):
        import_hf(folder, tmp_path / "run", single_device_mesh())
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


MICRO = str(Path(__file__).parents[1] / "train" / "micro.py")


@pytest.mark.grid
def test_training_begins_from_an_import_and_does_not_resume_it(tmp_path, monkeypatch, capsys):
    """train.init_from: step 0 is the imported model, on a mesh, with a fresh optimizer; the import stays as it was."""
    sys.path.insert(0, str(Path(MICRO).parent))
    import micro

    monkeypatch.chdir(tmp_path)
    prepare(str(Path(json.__file__).parent), "store", "byte", pattern="*.py", validation_fraction=0.5)
    config = json.loads(json.dumps(hf_config(micro.config().model, "plain", 32, "float32", 256, 257)))
    tensors = draw_tensors(config)
    import_hf(write_checkpoint(tmp_path / "hf", config, tensors), tmp_path / "imported", single_device_mesh())
    arguments = ["train", MICRO, "--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2"]
    assert main([*arguments, "--train.run-dir", "imported"]) == 2
    error = capsys.readouterr().err
    assert "1 problem\n" in error and "--train.init-from imported and another train.run_dir" in error
    assert main([*arguments, "--train.init-from", "imported", "--model.q-lora-rank", "8"]) == 2
    assert "model.q_lora_rank = 8: must be 16, as train.init_from = 'imported' has" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    begin = [*arguments, "--train.init-from", "imported", "--train.eval-every", "none", "--checkpoint.keep-last", "5"]
    assert main([*begin, "--train.num-steps", "1"]) == 0
    first = load_run("run", 0).state.params
    np.testing.assert_array_equal(first["head"], tensors["lm_head.weight"].T)
    up = tensors["model.layers.1.mlp.experts.2.up_proj.weight"].T
    np.testing.assert_array_equal(first["moe"]["ffn"]["up"][0, 2], up)
    assert not np.array_equal(load_run("run", 1).state.params["head"], first["head"])
    shutil.rmtree("imported")
    assert main([*begin, "--train.num-steps", "2"]) == 0  # needs its source no more


def test_unsafe_names_do_not_leave_the_folder(tmp_path, capsys, tensors):
    folder = write(tmp_path, tensors, num_files=2)
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["x"] = "../outside.safetensors"
    index.write_text(json.dumps(values))
    (problem,) = problems_of(tmp_path, capsys, folder)
    assert "which is not a file of the same folder" in problem


def test_config_with_wrong_kinds_of_values(tmp_path, capsys, tensors):
    for number, change in enumerate(
        (
            {"rope_scaling": "yarn"},
            {"rope_parameters": [1]},
            {"quantization_config": "fp8"},
            {"quantization_config": {"quant_method": "awq", "weight_block_size": 128}},
            {"hidden_size": "32"},
        )
    ):
        folder = write_checkpoint(tmp_path / f"hf{number}", K2 | change, tensors)
        found = problems_of(tmp_path, capsys, folder)
        assert all("config.json" in problem for problem in found) and len(found) == (2 if number == 3 else 1)


def test_folders_that_are_something_else(tmp_path, capsys, tensors):
    """A run where a published checkpoint is wanted, and the other way round; a file where a folder must be made."""
    folder = write(tmp_path, tensors)
    import_hf(folder, tmp_path / "imported", single_device_mesh())
    assert "is a run of k2jax already" in problems_of(tmp_path, capsys, tmp_path / "imported")[0]
    assert main(["export", str(folder), "--to", str(tmp_path / "x")]) == 2
    assert f"is a published checkpoint, not a run; `k2jax import {folder}`" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    for command in (["export", str(tmp_path / "imported")], ["import", str(folder)]):
        assert main([*command, "--to", str(tmp_path / "file" / "sub")]) == 2
        error = capsys.readouterr().err
        assert "1 problem\n" in error and "cannot be written: Not a directory" in error
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("dtype", ["bf16", "int8", None])
def test_dtypes_that_are_none(tmp_path, tensors, dtype):
    with pytest.raises(UserError, match="must be a float type"):
        load_hf(write(tmp_path, tensors), dtype=dtype)


def test_arguments_of_a_wrong_rank(tmp_path, tensors):
    model = load_hf(write(tmp_path, tensors))
    with pytest.raises(ValueError, match=r"must be \[B, T\], got \(3,\)"):
        model(np.arange(3))
