"""A model on a mesh: the same tokens, losses and texts as on one device."""

import dataclasses

import jax
import numpy as np
import pytest

from k2jax.cli.main import main
from k2jax.config import KernelsConfig, MeshConfig
from k2jax.data.loader.corpus import open_corpus
from k2jax.errors import UserError
from k2jax.inference import evaluate
from k2jax.inference.evaluate import perplexity
from k2jax.inference.generate import continue_tokens
from k2jax.inference.lm_eval import Scorer
from k2jax.inference.load import load_run, use_kernels
from k2jax.inference.mesh import SCORING_AXES, inference_mesh
from k2jax.model.transformer import declarations
from k2jax.model.weights import weight_leaves
from k2jax.train.batch import BatchLayout

# 1, 3 and 9 tokens: rows are filled up to the shards of the data axes, and all outgrow the window of 16.
CONTEXTS = [[256], list(b"abcdefghi"), list(b"xyz")]
MESHES = [
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"expert": 4, "tensor": 2},
    {"replica": 2, "fsdp": 4},
]


def on_mesh(place, sizes, **options):
    return load_run(place / "run", sizes=MeshConfig(**sizes), **options)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def spread(request, place):
    return on_mesh(place, request.param)


@pytest.fixture(scope="module")
def greedy_alone(loaded):
    return continue_tokens(loaded, CONTEXTS, 20, 0.0, 0, ())


def test_each_device_holds_its_own_part(spread, loaded):
    """Of every matrix an eighth, or what the axes leave whole by the table: replicas are copies."""
    devices, copies = spread.mesh.size, spread.mesh.shape["replica"]
    for alone, array, weight in zip(
        *map(jax.tree.leaves, (loaded.state.params, spread.state.params)),
        weight_leaves(declarations(loaded.config.model)),
        strict=True,
    ):
        assert array.sharding.spec == weight.spec(spread.mesh.shape)
        if weight.inputs:
            assert array.addressable_shards[0].data.size * devices == array.size * copies
        np.testing.assert_array_equal(array, alone)
    for bias in jax.tree.leaves(spread.state.router_bias):
        assert bias.sharding.is_fully_replicated and len(bias.addressable_shards) == devices


@pytest.mark.parametrize("spread", MESHES[:2], ids=str, indirect=True)
def test_same_greedy_tokens(spread, greedy_alone):
    """Past the window. In float32 logits differ by some 2e-6 of the largest; in float64: tests/model/test_decode.py."""
    assert continue_tokens(spread, CONTEXTS, 20, 0.0, 0, ()) == greedy_alone


def test_same_sampled_tokens(place, loaded):
    """Rows that are filled up change nobody's draw."""
    alone, found = (continue_tokens(model, CONTEXTS, 6, 1.0, 7, ()) for model in (loaded, on_mesh(place, MESHES[2])))
    assert alone == found


@pytest.mark.parametrize("sizes", [MESHES[0], pytest.param(MESHES[2], marks=pytest.mark.grid), {"context": 2, "expert": 2, "tensor": 2}], ids=str)
def test_same_perplexity(place, loaded, sizes):
    """Of 23 sequences, which no data axis divides: of 16 and of 7, filled up."""
    store = open_corpus(str(place / "store"))
    alone, found = (
        perplexity(model, store, 23) for model in (loaded, on_mesh(place, sizes, axes=SCORING_AXES))
    )
    assert found.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-6)
    assert found.tokens == alone.tokens == 23 * 16


def test_a_process_reads_the_rows_of_its_own_devices_alone(place, monkeypatch):
    """As if the first half of the mesh were one process's: the rows that it asks for, and those that it puts there."""
    asked, put = [], []
    batches = evaluate.validation_batches

    def reading(corpus, config, count, rows, source, places):
        asked.append(places.tolist())
        return batches(corpus, config, count, rows, source, places)

    class Half(BatchLayout):
        def on_mesh(self, values):
            put.append(len(values))
            return super().on_mesh(np.concatenate([values, values]))  # what the other process would put

        @property
        def own(self):
            return BatchLayout.places_for(self, list(self.mesh.devices.flat[:4]))

    monkeypatch.setattr(evaluate, "validation_batches", reading)
    monkeypatch.setattr(evaluate, "BatchLayout", Half)
    monkeypatch.setattr(Half, "places", property(lambda self: self.own if not put else np.arange(16)))
    perplexity(on_mesh(place, MESHES[0], axes=SCORING_AXES), open_corpus(str(place / "store")), 16)
    assert asked == [list(range(8))] and put == [8] * 4


def test_same_scores(place, loaded):
    """Log-probabilities and greedy choices: of 3 rows in batches of 2, and of 1 token, which tensor does not divide."""
    greedy = continue_tokens(loaded, [[256, 100]], 4, 0.0, 0, ())[0]
    rows = [([256], [97]), (list(b"ab"), list(b"cd")), ([256, 100], greedy)]
    scorers = [Scorer(model, 2) for model in (loaded, on_mesh(place, MESHES[0]))]
    alone, found = (scorer(rows) + scorer(rows[:1]) for scorer in scorers)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in alone], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in alone] == [False, False, True, False]


def test_kernels_of_the_run_are_not_used(loaded):
    """It may have been trained with those of another platform, and with a buffer that drops rows."""
    trained = loaded.config.replace({"kernels.exchange": "ragged", "kernels.expert_buffer": 1.0})
    assert use_kernels(trained) == trained.replace({"kernels": KernelsConfig()})


def test_the_first_of_equal_logits_is_greedy(place, loaded):
    """A model of zeros: every logit is the same, so the greedy choice is id 0, on `tensor`'s first shard."""
    for model in (loaded, on_mesh(place, {"fsdp": 4, "tensor": 2})):
        state = dataclasses.replace(model.state, params=jax.tree.map(lambda x: x * 0, model.state.params))
        scored = Scorer(dataclasses.replace(model, state=state), 4)([([1], [0]), ([1], [200])])
        np.testing.assert_allclose([score for score, _ in scored], -np.log(258), rtol=1e-6)
        assert [greedy for _, greedy in scored] == [True, False]


def test_rope_of_the_phase_that_was_trained(place, loaded):
    """The phase is that of the run's own steps, whatever length is scored."""
    values = {"phases.start_tokens": (0, 200 * loaded.config.batch_tokens), "phases.rope": ("plain", "yarn")}
    values |= {"phases.router_bias_rate": (0.0, 0.0), "phases.balance_alpha": (0.0, 0.0)}
    values |= {"model.rope.original_max_position_embeddings": 4}
    store, state = open_corpus(str(place / "store")), dataclasses.replace(loaded.state, step=np.int32(201))
    found = []
    for changes in ({}, {"phases.rope": ("yarn", "yarn")}, {"phases.rope": ("plain", "plain")}):
        config = loaded.config.replace(values | changes)
        found.append(perplexity(dataclasses.replace(loaded, config=config, state=state), store, 4, 8).nats_per_token)
    assert found[0] == found[1] != found[2]


def test_what_does_not_fit_is_said_at_once(place, capsys):
    run = str(place / "run")
    sizes = ["--mesh.tensor", "4", "--mesh.fsdp", "3", "--mesh.stage", "2", "--mesh.context", "2"]
    assert main(["generate", run, *sizes]) == 2
    error = capsys.readouterr().err
    for line in (
        "7 problems",
        "mesh.stage = 2: must be 1 here: pipeline stages are for training alone; give mesh.expert or mesh.fsdp more",
        "mesh.context = 2: must be 1 here: new tokens are too few to cut; give mesh.tensor more",
        "model.vocab_size = 258: must be a multiple of mesh.tensor = 4; nearest: 256 or 260",
        "model.hidden_size = 32: must be a multiple of mesh.fsdp = 3; nearest: 30 or 33",
        "model.q_lora_rank = 16: must be a multiple of mesh.fsdp = 3; nearest: 15 or 18",
        "model.kv_lora_rank = 16: must be a multiple of mesh.fsdp = 3; nearest: 15 or 18",
        "needs 48 devices, there are 8",
    ):
        assert line in error
    assert main(["eval", run, "--mesh.tensor", "0", "--mesh.stage", "4"]) == 2
    error = capsys.readouterr().err
    assert "2 problems" in error and "mesh.tensor = 0: must be" in error and "mesh.stage = 4: must be 1 here" in error
    with pytest.raises(UserError, match="model.num_attention_heads = 4: must be a multiple of mesh.tensor = 8"):
        inference_mesh(MeshConfig(tensor=8), load_run(place / "run").config.model)


def test_length_that_the_mesh_does_not_divide(place):
    spread = on_mesh(place, {"context": 4, "tensor": 2}, axes=SCORING_AXES)
    with pytest.raises(UserError, match=r"--length 12: must be a multiple of .* = 8; nearest: 8 or 16"):
        perplexity(spread, open_corpus(str(place / "store")), 4, 12)


def test_commands_on_a_mesh(place, capsys, tmp_path):
    """The exported folder on a mesh gives the text of the run on one device; the kernels are printed apart from it."""
    run, out, texts = str(place / "run"), str(tmp_path / "hf"), []
    assert main(["export", run, "--to", out, "--dtype", "f32"]) == 0
    capsys.readouterr()
    mesh = ["--mesh.expert", "4", "--mesh.tensor", "2"]
    for source, options in ((run, []), (out, mesh)):
        assert main(["generate", source, "def f(", "class", "x", "--tokens", "4", "--temperature", "0", *options]) == 0
        text, said = capsys.readouterr()
        assert ("exchange dense x 4" in said) == bool(options)
        texts.append(text)
    assert texts[0] == texts[1] and texts[0].startswith("def f(")
