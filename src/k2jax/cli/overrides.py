"""A Config from a config file and `--section.field value` arguments; every problem is reported at once."""

import contextlib
import io
import re
import typing
from pathlib import Path
from types import NoneType

from k2jax.config import Config, field_types, section_names, unknown_field
from k2jax.config_rules import describe_type
from k2jax.errors import UserError
from k2jax.user_code import call_beside, describe_error, error_line, run_file


def _describe(path: str, error: Exception) -> list[str]:
    """Problems of a config file that raised, with its line; for a field that does not exist, the one that was meant."""
    if isinstance(error, UserError):
        return [f"{error_line(path, error)}: {problem}" for problem in error.problems]
    match = re.fullmatch(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    sections = {kind.__name__: f"{name}." for name, kind in section_names().items()} | {"Config": ""}
    if isinstance(error, TypeError) and match and match[1] in sections:
        return [f"{error_line(path, error)}: {unknown_field(sections[match[1]] + match[2])}"]
    return [describe_error(path, error)]


def load_config(path: str) -> Config:
    """The value of config() in a Python file. Raises UserError if there is no such file, function or value."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder, not a config file; give the file that the run was started with")
    if not Path(path).is_file():
        near = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise UserError(f"{path}: no such config file" + (f"; there are {near}" if near else ""))
    try:
        names = run_file(path)
        config = call_beside(path, names["config"]) if callable(names.get("config")) else None
    except Exception as error:  # the file is the user's code: whatever it raises is theirs to correct
        raise UserError(*_describe(path, error)) from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: must define config() and return a k2jax.config.Config, got {type(config).__name__}")
    return config


def _with_lists():
    """Tyro's rules, but a list is one argument, its values joined by commas: read so, and shown so by --help."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if typing.get_origin(info.type) is not tuple:
            return None
        one = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(typing.get_args(info.type)[0], set()))
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{one.metavar}[,{one.metavar} ...]",
            instance_from_str=lambda args: tuple(one.instance_from_str([value]) for value in args[0].split(",")),
            is_instance=lambda values: isinstance(values, tuple),
            str_from_instance=lambda values: [",".join(one.str_from_instance(value)[0] for value in values)],
        )

    return registry


def _parse_value(kind: object, text: str) -> object:
    """`text` as a value of a field's type, as tyro reads it; raises ValueError."""
    import tyro  # 0.1 s, and only needed where something is overridden

    if kind is str:
        return text
    if text.lower() == "none" and NoneType in typing.get_args(kind):  # train.remat has a "none" of its own
        text = "None"
    try:
        with contextlib.redirect_stderr(io.StringIO()), _with_lists():
            return tyro.cli(kind, args=[text], console_outputs=False)
    except SystemExit:
        raise ValueError(text) from None


def _describe_text(kind: object) -> str:
    commas = ", joined by commas" if tuple in map(typing.get_origin, (kind, *typing.get_args(kind))) else ""
    return describe_type(kind) + commas


def read_overrides(arguments: list[str]) -> tuple[dict[str, object], list[str]]:
    """({"section.field": value}, problems) of `--section.field value` (or `--section.field=value`) arguments."""
    types, texts, values, problems = field_types(), {}, {}, []
    rest = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") and "=" in a else [a])]
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            rule = "arguments are pairs --section.field value, the values of a list joined by commas"
            problems.append(f"{name}: stands alone; {rule}")
            continue
        field = name[2:].replace("-", "_")
        value = rest.pop(0) if rest and not rest[0].startswith("--") else None
        if field not in types:
            problem = unknown_field(field)
            # Fields have a dot: --simulate where it is not known is rather meant as an option.
            is_option = "." not in field and problem.startswith(f"{field}: no such field")
            problems.append(f"{name}: is no option of this command; {problem}" if is_option else problem)
        elif value is None:
            problems.append(f"{field}: needs a value, {_describe_text(types[field])}")
        elif field in texts:
            problems.append(f"{field}: given twice, as {texts[field]!r} and as {value!r}; give it once")
        else:
            texts[field] = value
            try:
                values[field] = _parse_value(types[field], value)
            except ValueError:
                problems.append(f"{field} = {value!r}: must be {_describe_text(types[field])}")
    return values, problems


def overridden(config: Config, arguments: list[str]) -> tuple[Config, list[str]]:
    """(`config` with the arguments of `read_overrides`, its problems: unknown fields, unreadable values, broken rules)."""
    values, problems = read_overrides(arguments)
    changed = config.replace(values)
    return changed, problems + changed.problems()


def override(config: Config, arguments: list[str]) -> Config:
    """The config of `overridden`; raises UserError with all of its problems."""
    changed, problems = overridden(config, arguments)
    if problems:
        raise UserError(*problems)
    return changed


def print_fields(config: Config, prog: str) -> None:
    """All fields with their types and the values that `config` gives them."""
    import tyro

    with contextlib.suppress(SystemExit), _with_lists():
        tyro.cli(type(config), default=config, args=["--help"], prog=prog, config=(tyro.conf.FlagConversionOff,))
