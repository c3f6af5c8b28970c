"""Refuses kernels that the devices of a mesh do not have."""

import jax

from k2jax.config import Config
from k2jax.errors import UserError
from k2jax.kernels.grouped_matmul import tokamax_problem
from k2jax.kernels.tokamax import HOW_TO_INSTALL, is_installed
from k2jax.kernels.tokamax_attention import TILE
from k2jax.model.attention import choose_attention


def _attention_problems(config: Config, mesh: jax.sharding.Mesh, platform: str) -> list[str]:
    kernels, length, context = config.kernels, config.data.sequence_length, mesh.shape["context"]
    if choose_attention(kernels, platform, length, context) == "chunked":
        return []
    problems, given = [], f"kernels.attention = '{kernels.attention}'"
    if platform == "cpu":
        problems.append(f"{given}: has no kernel for CPUs; use 'chunked'")
    elif not is_installed():
        means = "" if kernels.attention == "tokamax" else ", on TPU 'tokamax'"
        problems.append(f"{given}{means}: {HOW_TO_INSTALL}; or use 'chunked', far slower on TPU")
    if context > 1:
        problems.append(f"{given}: needs mesh.context = 1; use 'chunked', or give tensor more")
    if length % TILE:
        nearest = max(TILE, round(length / TILE) * TILE)
        rule = f"must be a multiple of {TILE} for {given}"
        problems.append(f"data.sequence_length = {length}: {rule}, such as {nearest}; or use 'chunked'")
    return problems


def check_kernels(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError if `kernels` names what the mesh's devices do not have."""
    kernels, platform = config.kernels, mesh.devices.flat[0].platform
    problems = []
    if kernels.exchange == "ragged" and platform == "cpu" and mesh.shape["expert"] > 1:
        problems.append("kernels.exchange = 'ragged': CPUs have no such collective; use 'dense', 'ring' or 'auto'")
    if kernels.grouped_matmul == "tokamax" and platform == "cpu":
        problems.append("kernels.grouped_matmul = 'tokamax': has no kernel for CPUs; use 'blocked' or 'auto'")
    if kernels.grouped_matmul == "tokamax" and platform == "gpu" and (problem := tokamax_problem()) is not None:
        problems.append(f"kernels.grouped_matmul = 'tokamax': {problem}; use 'blocked' or 'auto'")
    problems += _attention_problems(config, mesh, platform)
    if problems:
        raise UserError(*problems)
