"""A token store and an untrained model whose choices are sharp, as a run directory."""


import jax
import micro
import pytest

from k2jax.config import Config, DataConfig, PhasesConfig, TrainConfig
from k2jax.data.saved_tokenizer import save_tokenizer
from k2jax.data.tokenizer import load_tokenizer
from k2jax.inference.load import load_run
from k2jax.model.transformer import declarations, init_router_bias
from k2jax.model.weights import init_params
from k2jax.runs.folder import write_config
from k2jax.runs.identity import make_identity
from k2jax.train.checkpoint import save_model

WINDOW = 16


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A token store, and a run directory with an untrained model whose choices are sharp."""
    folder = tmp_path_factory.mktemp("use")
    micro.make_store(folder)
    config = Config(
        model=micro.config().model,
        data=DataConfig(path=str(folder / "store"), sequence_length=WINDOW),
        phases=PhasesConfig(start_tokens=(0,), rope=("plain",), router_bias_rate=(0.0,), balance_alpha=(0.0,)),
        train=TrainConfig(run_dir=str(folder / "run"), compute_dtype="float32"),
    ).validate()
    params = init_params(declarations(config.model), jax.random.key(0), 0.3)
    (folder / "run").mkdir()
    write_config(folder / "run", config)
    make_identity(folder / "run")
    save_model(folder / "run" / "checkpoints", {"params": params, "router_bias": init_router_bias(config.model)})
    save_tokenizer(load_tokenizer("byte"), folder / "run" / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def loaded(place):
    return load_run(place / "run")
