"""Continue a text with a trained model, one token at a time over a window of the training length."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import Config, UserError
from k2jax.data.tokens import TokenStore
from k2jax.model.transformer import build_model
from k2jax.sharding.mesh import single_device_mesh
from k2jax.train.checkpoint import committed_steps, damage, parts, restore_model, restore_run
from k2jax.train.run_dir import read_config
from k2jax.train.state import abstract_state
from k2jax.train.step import make_optimizer


def load_run(run_dir: str) -> tuple[Config, int, dict]:
    """(config, step, {"params", "router_bias"}) of a run's newest checkpoint, on one device.

    Raises UserError where `run_dir` is no run or has no checkpoint.
    """
    folder = Path(run_dir)
    config = read_config(folder)
    steps = committed_steps(folder / "checkpoints")
    if not steps:
        raise UserError(f"{folder}: has no committed checkpoint yet")
    if wrong := damage(folder / "checkpoints", steps[-1]):
        raise UserError(*wrong, "resume the training, which goes back to the newest sound step")
    mesh = single_device_mesh()
    abstract = abstract_state(config, make_optimizer(config, mesh), mesh)
    return config, steps[-1], restore_model(folder / "checkpoints", steps[-1], parts(abstract)["model"])


def sample(config: Config, model: dict, prompt: list[int], num_tokens: int, temperature: float, seed: int, stop: int):
    """Yield up to `num_tokens` token ids after `prompt`, ending early before the token `stop`.

    temperature 0 is greedy. Once the window of data.sequence_length is full, its oldest half is forgotten.
    """
    window = config.data.sequence_length
    dtype = jnp.dtype(config.train.compute_dtype)

    @jax.jit
    def next_token(params, router_bias, tokens_BT, length, key):
        out = build_model(config.model, params, router_bias, dtype)(tokens_BT)
        logits_V = out.logits[0, length - 1]
        if temperature == 0:
            return jnp.argmax(logits_V)
        return jax.random.categorical(key, logits_V / temperature)

    context, key = list(prompt), jax.random.key(seed)
    for index in range(num_tokens):
        if len(context) > window:
            context = context[-max(window // 2, 1) :]
        tokens_BT = np.zeros((1, window), np.int32)
        tokens_BT[0, : len(context)] = context
        token = int(
            next_token(model["params"], model["router_bias"], tokens_BT, len(context), jax.random.fold_in(key, index))
        )
        if token == stop:
            return
        context.append(token)
        yield token


def generate(run_dir: str, prompt: str, num_tokens: int, temperature: float, seed: int) -> str:
    """`prompt` continued by `num_tokens` tokens or to the end of the document; the text of the continuation alone."""
    problems = []
    if not (math.isfinite(temperature) and temperature >= 0):
        problems.append(f"temperature = {temperature}: must be a number of at least 0; 0 is greedy")
    if num_tokens < 0:
        problems.append(f"tokens = {num_tokens}: must be at least 0")
    if not 0 <= seed < 2**32:
        problems.append(f"seed = {seed}: must be at least 0 and below 2**32")
    if problems:
        raise UserError(*problems)
    config, step, model = load_run(run_dir)
    store = TokenStore(config.data.path)
    trained_on = restore_run(Path(run_dir) / "checkpoints", step)["data_position"]["manifest"]
    if store.digest != trained_on:
        raise UserError(
            f"{store.path}: is not the token store that {run_dir} was trained on (manifest {trained_on[:12]}...)"
        )
    tokenizer = store.tokenizer()
    with jax.set_mesh(single_device_mesh()):
        start = [tokenizer.bos, *map(int, tokenizer.encode(prompt))]
        return tokenizer.decode(list(sample(config, model, start, num_tokens, temperature, seed, tokenizer.eos)))
