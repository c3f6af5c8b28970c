"""A Config from a config file and `--section.field value` arguments; every problem is reported at once."""

import contextlib
import io
import runpy
import typing
from pathlib import Path
from types import NoneType

from k2jax.checks import describe_type
from k2jax.config import Config, UserError, field_types, unknown_field


def load_config(path: str) -> Config:
    """The value of config() in a Python file. Raises UserError where there is no such file, function or value."""
    if not Path(path).is_file():
        near = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise UserError(f"{path}: no such config file" + (f"; there are {near}" if near else ""))
    try:
        names = runpy.run_path(path)
        config = names["config"]() if callable(names.get("config")) else None
    except Exception as error:  # the file is the user's code: whatever it raises is theirs to mend
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: must define config() and return a k2jax.config.Config, got {type(config).__name__}")
    return config


def _parse_value(kind: object, text: str) -> object:
    """`text` as a value of a field's type, as tyro reads it, lists with commas; raises ValueError."""
    import tyro  # 0.1 s, and only needed where something is overridden

    if kind is str:
        return text
    if text.lower() == "none" and NoneType in typing.get_args(kind):  # train.remat has a "none" of its own
        text = "None"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            is_list = tuple in map(typing.get_origin, (kind, *typing.get_args(kind)))  # or a list or None
            args = text.split(",") if is_list else [text]
            return tyro.cli(kind, args=args, console_outputs=False)
    except SystemExit:
        raise ValueError(text) from None


def read_overrides(arguments: list[str]) -> tuple[dict[str, object], list[str]]:
    """({"section.field": value}, problems) of `--section.field value` (or `--section.field=value`) arguments."""
    types, values, problems = field_types(), {}, []
    rest = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") and "=" in a else [a])]
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            problems.append(f"{name}: stands alone; arguments are pairs --section.field value")
            continue
        field = name[2:].replace("-", "_")
        value = rest.pop(0) if rest and not rest[0].startswith("--") else None
        if field not in types:
            problems.append(unknown_field(field))
        elif value is None:
            problems.append(f"{field}: needs a value, {describe_type(types[field])}")
        else:
            try:
                values[field] = _parse_value(types[field], value)
            except ValueError:
                problems.append(f"{field} = {value!r}: must be {describe_type(types[field])}")
    return values, problems


def override(config: Config, arguments: list[str]) -> Config:
    """`config` with the arguments of `read_overrides` applied, then validated.

    Raises UserError that lists unknown fields, unreadable values and violated rules together.
    """
    values, problems = read_overrides(arguments)
    changed = config.replace(values)
    try:
        changed.validate()
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    return changed


def print_fields(config: Config, prog: str) -> None:
    """All fields with their types and the values that `config` gives them."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(Config, default=config, args=["--help"], prog=prog, config=(tyro.conf.FlagConversionOff,))
