"""Against the libraries as they are installed: transformers, mlx-lm, lm-eval (extra [interop], `make test-interop`)."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_published import SHAPES, draw_tensors, inputs, write_checkpoint

from k2jax import load_hf
from k2jax.data.saved_tokenizer import save_tokenizer
from k2jax.data.tokenizer import load_tokenizer
from k2jax.inference.generate import continue_tokens
from k2jax.interop.export import export_run
from k2jax.interop.hf import import_hf, load_published
from k2jax.sharding.mesh import single_device_mesh

# the other libraries' own warnings are none of ours
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module", params=sorted(SHAPES))
def exported(request, tmp_path_factory):
    """(folder, tokens) of an exported float32 model that speaks bytes."""
    place = tmp_path_factory.mktemp(request.param)
    # mlx-lm quantizes in groups of 64 inputs, so every input dim is a multiple of that here
    config = SHAPES[request.param] | {
        "vocab_size": 258,
        "hidden_size": 128,
        "kv_lora_rank": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    }
    if config["q_lora_rank"]:
        config["q_lora_rank"] = 64
    import_hf(write_checkpoint(place / "hf", config, draw_tensors(config)), place / "run", single_device_mesh())
    save_tokenizer(load_tokenizer("byte"), place / "run" / "tokenizer")
    export_run(place / "run", place / "out", dtype="f32")
    return place / "out", inputs(config)["tokens"]


@pytest.fixture(scope="module")
def logits(exported):
    model = load_hf(exported[0])
    return np.asarray(jax.jit(lambda t: model(t).logits)(exported[1]))


def test_transformers(exported, logits):
    """Every tensor is loaded, the tokenizer gives the ids of ours, the logits are the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, tokens = exported
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=2e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def main(é):\n\treturn 1"
    assert tokenizer.encode(text, add_special_tokens=False) == load_tokenizer("byte").encode(text).tolist()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)


def test_mlx(exported, logits):
    """The same logits and, token by token with its own cache, the same greedy continuation."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    folder, tokens = exported
    model, tokenizer = load(str(folder))
    theirs = np.array(model(mx.array(tokens)).astype(mx.float32))
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=2e-4)
    prompt = [256, *b"def f(x):"]
    assert [256, *tokenizer.encode("def f(x):")] == prompt
    steps = generate_step(mx.array(prompt), model, max_tokens=24)
    greedy = [int(token) for token, _ in steps]
    assert continue_tokens(load_published(folder), [prompt], 24, 0.0, 0, ())[0] == greedy


def test_mlx_converts_to_4_bits_and_generates(exported, tmp_path):
    folder, _ = exported
    convert = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "q4")]
    done = subprocess.run([*convert, "-q", "--q-bits", "4"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "q4" / "config.json").read_text())["quantization"]["bits"] == 4
    generate = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "q4"), "--prompt", "def f("]
    done = subprocess.run([*generate, "--max-tokens", "8"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Generation: 8 tokens" in done.stdout


TASK = """
task: bytes_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def test_harness_task_from_a_folder(exported, tmp_path, capsys):
    """A multiple-choice task of our own: the model's accuracy is what its own logits say, counted here."""
    from k2jax.cli.main import main

    folder, _ = exported
    stream, docs = np.random.RandomState(0), []
    for _ in range(12):
        words = ["".join(map(chr, stream.randint(97, 123, 6))) for _ in range(4)]
        docs.append({"question": words[0], "choices": words[1:], "answer": int(stream.randint(3))})
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "docs.jsonl"))
    assert main(["eval", str(folder), "--tasks", "bytes_choice", "--task-folder", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["requests_shortened"] == 0
    model = load_hf(folder)
    forward, right = jax.jit(lambda t: jax.nn.log_softmax(model(t).logits, -1)), 0
    for doc in docs:
        scores = []
        for choice in doc["choices"]:
            tokens = [256, *doc["question"].encode(), *choice.encode()]
            logs = np.asarray(forward(np.array([tokens[:-1]])))[0]
            scores.append(sum(logs[i - 1, tokens[i]] for i in range(len(tokens) - len(choice), len(tokens))))
        right += int(np.argmax(scores)) == doc["answer"]
    assert printed["results"]["bytes_choice"]["acc,none"] == pytest.approx(right / len(docs))
    assert main(["eval", str(folder), "--tasks", "no_such_task"]) == 2
    assert "knows no such task" in capsys.readouterr().err


def test_harness_rolling_and_generation(exported):
    """Rolling log-likelihood is the sum over all bytes in windows; generate_until ends before its stop."""
    from lm_eval.api.instance import Instance

    from k2jax.inference.lm_eval import harness_model

    loaded = load_published(exported[0])
    model = harness_model(loaded)
    text = "def f(x): return x"
    (total,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    tokens = [256, *text.encode()]
    plain = load_hf(exported[0])
    logs = np.asarray(jax.nn.log_softmax(plain(np.array([tokens[:-1]])).logits, -1))[0]
    assert total == pytest.approx(float(np.take_along_axis(logs, np.array(tokens[1:])[:, None], -1).sum()), rel=1e-4)
    options = {"until": [], "max_gen_toks": 12}

    def generated(prompt, **changes):
        (found,) = model.generate_until([Instance("generate_until", {}, (prompt, options | changes), 0)])
        return found

    prompt = next(p for p in ("a", "b", "class", "if x") if len(generated(p)) > 4)
    free = generated(prompt)
    assert generated(prompt, until=[free[3]]) == free[: free.index(free[3])]


@pytest.mark.parametrize("limit", ["5GB", "40KB"])
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_what_transformers_saves_is_imported(name, limit, tmp_path):
    """save_pretrained in one file and in several, with rope_parameters alone in its config.json."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = {k: v for k, v in SHAPES[name].items() if k not in ("model_type", "architectures", "torch_dtype")}
    scaling, theta = fields.pop("rope_scaling") or {"type": "default"}, fields.pop("rope_theta")
    rope = {"rope_type" if k == "type" else k: v for k, v in scaling.items()} | {"rope_theta": theta}
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**fields, rope_parameters=rope)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
        for key, buffer in model.named_buffers():
            buffer.normal_(0, 0.2) if "correction" in key else None
        tokens = inputs(SHAPES[name])["tokens"]
        theirs = model(torch.tensor(tokens)).logits.numpy()
    model.save_pretrained(tmp_path / "saved", max_shard_size=limit)
    ours = load_hf(tmp_path / "saved")(tokens).logits
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)
