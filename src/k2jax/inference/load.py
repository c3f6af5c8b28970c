"""A trained model with all that using it takes: for generation, evaluation and other libraries' harnesses."""

from dataclasses import dataclass
from pathlib import Path

import jax

from k2jax.config import Config
from k2jax.data.saved_tokenizer import open_tokenizer
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import UserError
from k2jax.runs.commits import sound_step
from k2jax.runs.folder import RunFolder, read_config
from k2jax.train.checkpoint import model_part, restore_model
from k2jax.train.state import TrainState, abstract_model


@dataclass(frozen=True)
class LoadedModel:
    """`state` has what the model needs alone; `config` is the run's, or made for a published checkpoint; no mesh."""

    source: str
    config: Config
    state: TrainState
    tokenizer: Tokenizer | None

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained to see."""
        return self.config.data.sequence_length

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UserError if the source brought none."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.source}: brings no tokenizer (tiktoken.model, or tokenizer.json with bos and eos ids)"
            )
        return self.tokenizer


def load_run(run_dir: str | Path, step: int | None = None) -> LoadedModel:
    """The model of a committed step, by default the newest, on the first device.

    Raises UserError if `run_dir` is no run, or has no such sound step.
    """
    folder = Path(run_dir)
    config = read_config(folder)
    files = RunFolder(folder)
    step = sound_step(files.checkpoints, step)
    model = restore_model(files.checkpoints, step, model_part(*abstract_model(config)))
    state = TrainState(jax.numpy.int32(step), model["params"], model["router_bias"], None, None)
    tokenizer = open_tokenizer(files.tokenizer) if files.tokenizer.is_dir() else None
    return LoadedModel(str(run_dir), config, state, tokenizer)
