"""All that can be wrong with the start of a run and shows before anything is opened, found in one go."""

from collections.abc import Callable
from pathlib import Path

from k2jax.config import Config, differences, field_rules
from k2jax.errors import UserError
from k2jax.files import is_url
from k2jax.preflight.availability import check_kernels
from k2jax.preflight.ranks import WRITE_TEST
from k2jax.processes import on_first
from k2jax.runs.commits import committed_steps, is_model_alone
from k2jax.runs.folder import path_problem, read_config
from k2jax.runs.mirror import entries_of, open_run_folder, run_folder, shown
from k2jax.runs.rewind import skip_problems
from k2jax.sharding.mesh import make_mesh, single_device_mesh
from k2jax.words import counted


def check_run_dir(config: Config) -> dict[str, tuple[object, object]]:
    """The differences to the config that the run directory was made with; {} for a new one.

    Raises UserError if the directory is not ours, or where a field that shapes the future differs.
    """
    files = open_run_folder(config.train.run_dir)
    folder, where = files.path, shown(files.path)
    if rule := path_problem(folder):
        raise UserError(f"train.run_dir = {config.train.run_dir!r}: {rule}; give another")
    if not files.config.exists():
        # A start that ended before it wrote the config may have left these; glob finds nothing where nothing is.
        begun = files.config.name, files.lock.name, WRITE_TEST
        strangers = [name for name in entries_of(folder) if name != files.ranks.name and not name.startswith(begun)]
        if strangers:
            raise UserError(
                f"{where}: is not a run directory (no config.json) and is not empty: {', '.join(sorted(strangers)[:5])}"
            )
        return {}
    steps = committed_steps(files.checkpoints)
    if is_model_alone(files.checkpoints):
        raise UserError(
            f"{where}: holds an imported model without an optimizer's state; begin a training with it by "
            f"--train.init-from {where} and another train.run_dir"
        )
    changes = differences(read_config(folder), config)
    rule = (
        "this may not change within a run; restore it, or continue from the weights alone in a new run: "
        f"--train.run-dir NEW --train.init-from {where}"
    )
    # timeline.json and the data position keep the mixture, the stores and the skipped steps of the past from changing.
    rules = field_rules()
    problems = [
        f"{name}: the run in {where} has {old!r}, now given {new!r}; {rule}"
        for name, (old, new) in changes.items()
        if not rules[name].resume
    ]
    if steps and config.train.num_steps < steps[-1]:  # what was done beyond it would be in no account
        rule = f"the run in {where} has done {counted(steps[-1], 'step')}; give at least as many, or another train.run_dir"
        problems.append(f"train.num_steps = {config.train.num_steps}: {rule}")
    problems += skip_problems(files, config)
    if problems:
        raise UserError(*problems)
    return changes


def _problems_of(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except UserError as error:
        return list(error.problems)
    return []


def _missing(field: str, paths: str | None) -> list[str]:
    """Paths of a field, joined by commas, at which there is nothing; of URLs only their opening can tell."""
    names = [path.strip() for path in (paths or "").split(",") if path.strip()]
    return [f"{field}: {name}: there is no such folder or file" for name in names if not is_url(name) and not Path(name).exists()]


def _wrong_fields(config: Config) -> set[str]:
    return {problem.partition(" = ")[0].partition(":")[0] for problem in config.problems()}


def _has_steps(config: Config) -> bool:
    """True if the run has steps; a URL at which no run can be is told of elsewhere."""
    try:
        return bool(committed_steps(run_folder(config.train.run_dir).checkpoints))
    except UserError:
        return False


def path_problems(config: Config) -> list[str]:
    """Problems of the run directory, and of paths that must be there. A field that is wrong in itself is passed over."""
    wrong = _wrong_fields(config)
    paths = {"data.path": config.data.path, "data.validation_path": config.data.validation_path}
    of_run = [] if "train.run_dir" in wrong else _problems_of(lambda: check_run_dir(config))
    if "train.run_dir" not in wrong and not _has_steps(config):  # else needed no more
        paths["train.init_from"] = config.train.init_from
    problems = [problem for field, value in paths.items() if field not in wrong for problem in _missing(field, value)]
    return [*problems, *of_run]


def device_problems(config: Config) -> list[str]:
    """Problems of the mesh with the devices that there are, and of kernels that these do not have."""
    if any(name.startswith("mesh.") for name in _wrong_fields(config)):
        return []
    try:
        mesh, problems = make_mesh(config.mesh), []
    except UserError as error:
        mesh, problems = single_device_mesh(), list(error.problems)  # platforms have kernels or not, whatever the mesh
    return [*problems, *_problems_of(lambda: check_kernels(config, mesh))]


def check_start(config: Config) -> None:
    """Raise UserError with all of it: fields, mesh and kernels, paths; in all processes at once, the same in all."""
    problems = [*config.problems(), *device_problems(config), *on_first("paths", lambda: path_problems(config))]
    if problems:
        raise UserError(*problems)
