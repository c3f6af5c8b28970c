"""The identity of a run: run.json gives it a number of its own, and each of its commits carries that. Needs no jax.

So a checkpoint that was copied from another run, whose arrays may have the very same shapes, is not taken for this
run's. A copy of a whole run directory is the same run.
"""

import hashlib
import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path

from k2jax.config import Config, field_rules, flatten
from k2jax.errors import UserError
from k2jax.files import read_sealed, write_sealed
from k2jax.runs.folder import RunFolder, read_config


def config_digest(config: Config) -> str:
    """sha256 over the fields that may not change within a run."""
    rules = field_rules()
    fixed = {name: value for name, value in flatten(asdict(config)).items() if not rules[name].resume}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def make_identity(folder: Path) -> None:
    """Give the run in `folder` its number, if it has none yet."""
    if not os.path.lexists(RunFolder(folder).run):
        write_sealed(RunFolder(folder).run, {"id": secrets.token_hex(16)})


def identity(folder: Path) -> dict[str, str] | None:
    """{"id", "config"} of the run in `folder`; None if it is not a run.

    Raises UserError if one of its files is missing or was changed.
    """
    path = RunFolder(folder).run
    if not os.path.lexists(path) and not os.path.lexists(RunFolder(folder).config):
        return None
    rule = "without it no checkpoint is known to be this run's; restore it from a copy"
    number = read_sealed(path, rule)
    if not isinstance(number.get("id"), str):
        raise UserError(f"{path}: has no id; {rule}")
    return {"id": number["id"], "config": config_digest(read_config(folder))}
