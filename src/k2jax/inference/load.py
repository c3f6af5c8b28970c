"""A trained model with all that using it takes: for generation, evaluation and other libraries' harnesses."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from k2jax.config import Config, KernelsConfig, MeshConfig
from k2jax.data.saved_tokenizer import open_tokenizer
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import UserError
from k2jax.inference.mesh import DECODING_AXES, inference_mesh, on
from k2jax.model.choices import describe_experts
from k2jax.processes import on_first
from k2jax.runs.commits import sound_step
from k2jax.runs.folder import read_config
from k2jax.runs.mirror import open_run_folder
from k2jax.train.checkpoint import model_part, restore_model
from k2jax.train.state import TrainState, abstract_model


@dataclass(frozen=True)
class LoadedModel:
    """`state` has what the model needs alone; `config` is the run's, or made for a published checkpoint.

    mesh: None: all of it is on one device. The kernels in `config` are those that `use_kernels` chooses, not the run's.
    """

    source: str
    config: Config
    state: TrainState
    tokenizer: Tokenizer | None
    mesh: jax.sharding.Mesh | None = None

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained to see."""
        return self.config.data.sequence_length

    def on_mesh(self) -> contextlib.AbstractContextManager:
        """The context to use the model in."""
        return on(self.mesh)

    def describe(self) -> str:
        """The mesh and the kernels that the model runs with, in words."""
        if self.mesh is None:
            return "one device"
        axes = "  ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "all axes 1"
        device = self.mesh.devices.flat[0]
        return f"{self.mesh.size} x {device.device_kind} ({axes}); {describe_experts(self.config, self.mesh)}"

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UserError if the source brought none."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.source}: brings no tokenizer (tiktoken.model, or tokenizer.json with bos and eos ids)"
            )
        return self.tokenizer


def use_kernels(config: Config) -> Config:
    """`config` with kernels that platform and mesh decide when the model runs, whatever the run was trained with.

    The experts have room for all rows: what a training drops for want of room depends on its mesh and its batch.
    """
    return config.replace({"kernels": KernelsConfig()})


def load_run(
    run_dir: str | Path,
    step: int | None = None,
    sizes: MeshConfig | None = None,
    axes: tuple[str, ...] = DECODING_AXES,
) -> LoadedModel:
    """The model of a committed step, by default the newest.

    sizes: of the mesh, over all devices, each of which reads its own part alone; None: one device, without a mesh.
    axes: those that may be above 1, DECODING_AXES or, for scoring alone, SCORING_AXES. Raises UserError if `run_dir` is
    no run, has no such sound step, or its model does not go with the mesh.
    """
    files = open_run_folder(run_dir)
    config = use_kernels(read_config(files.path))
    mesh = None if sizes is None else inference_mesh(sizes, config.model, axes)
    # Of a run that still saves each process would see another newest step; and one reading of all files is enough.
    step = on_first("step", lambda: sound_step(files.checkpoints, step))
    model = restore_model(files.checkpoints, step, model_part(*abstract_model(config, mesh)))
    state = TrainState(np.int32(step), model["params"], model["router_bias"], None, None)
    tokenizer = open_tokenizer(files.tokenizer) if files.tokenizer.is_dir() else None
    return LoadedModel(str(run_dir), config, state, tokenizer, mesh)
