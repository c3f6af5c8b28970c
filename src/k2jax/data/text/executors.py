"""Who runs the ranks of a task: this process, or datatrove's executors on this machine, a Slurm or a Ray cluster.

All of them call the same function, and every machine must see the work folder under the same path.
"""

import functools
import importlib.util
import inspect
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from k2jax.data.text.job import Recipe, read_report, unfinished
from k2jax.data.text.sources import EXTRA
from k2jax.data.text.tasks import num_ranks, run_task_rank
from k2jax.errors import RunFailed, UserError

KINDS = ("local", "slurm", "ray")
_OURS = {"pipeline", "tasks", "workers", "logging_dir", "depends", "depends_job_id", "skip_completed", "with_srun"}
_POLL_SECONDS = 5.0


def _run_rank(data, rank: int, world_size: int, *, work: str, task: str) -> None:
    """A datatrove pipeline of one step."""
    run_task_rank(work, task, rank)


def _end_with_parent() -> None:
    """Have this worker end with the process that started it, whatever ended that."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_pickled(executor: bytes, rank: int) -> None:
    import dill
    import loguru

    loguru.logger.disable("datatrove")
    dill.loads(executor)._run_for_rank(rank, local_rank=1)


def _executor_class(kind: str):
    if kind == "slurm":
        from datatrove.executor.slurm import SlurmPipelineExecutor

        return SlurmPipelineExecutor
    if kind == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor
    from datatrove.executor.local import LocalPipelineExecutor

    class Local(LocalPipelineExecutor):
        """datatrove's own pool waits for ever for a worker that was killed, and leaves a process when we are."""

        def run(self) -> None:
            import dill

            call = functools.partial(_run_pickled, dill.dumps(self))
            context = multiprocessing.get_context("forkserver")  # a fork of a process with threads can hang
            with ProcessPoolExecutor(self.workers, context, _end_with_parent) as pool:
                for future in [pool.submit(call, rank) for rank in self.get_incomplete_ranks()]:
                    future.result()

    return Local


def _allowed_options(kind: str) -> dict:
    parameters = inspect.signature(_executor_class(kind)).parameters
    allowed = {name: parameter for name, parameter in parameters.items() if name not in _OURS}
    return {**allowed, "address": None} if kind == "ray" else allowed


def executor_problems(kind: str, workers: int, options: dict[str, str]):
    """Problems with a choice of executor."""
    if kind not in KINDS:
        yield f"executor = {kind!r}: must be one of {', '.join(KINDS)}"
        return
    if workers < 1:
        yield f"workers = {workers}: must be at least 1"
    if kind == "local" and workers == 1 and not options:
        return
    if importlib.util.find_spec("datatrove") is None:
        yield f"executor = {kind!r} with workers = {workers}: needs datatrove; {EXTRA}"
        return
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        yield "executor = 'ray': needs Ray; pip install 'k2jax[ray]'"
    if kind == "slurm" and shutil.which("sbatch") is None:
        yield "executor = 'slurm': sbatch is not on the PATH; start it on a machine that submits jobs"
    allowed = _allowed_options(kind)
    for name in options.keys() - allowed.keys():
        yield f"executor_options {name!r}: {kind} has {', '.join(sorted(allowed))}"
    for name in ("partition", "time") if kind == "slurm" else ():
        if name not in options:
            yield f"executor_options: slurm needs {name!r}, such as {name}=" + {"time": "20:00:00"}.get(name, "cpu")


def _value(text: str):
    """8, 2.5, true and null as JSON has them, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _wait_for_slurm(job: str, recipe: Recipe, work: Path, task: str) -> None:
    while unfinished(work, task, num_ranks(recipe, task)):
        queue = subprocess.run(["squeue", "-h", "-j", str(job)], capture_output=True, text=True)
        if queue.returncode or not queue.stdout.strip():
            return
        time.sleep(_POLL_SECONDS)


def _run_on_datatrove(kind: str, workers: int, options: dict[str, str], recipe: Recipe, work: Path, task: str) -> None:
    import loguru

    loguru.logger.disable("datatrove")  # what it has to say is in the logs of the ranks
    step = functools.partial(_run_rank, work=str(work), task=task)
    values = {name: _value(text) for name, text in options.items()}
    common = {"tasks": num_ranks(recipe, task), "workers": workers, "logging_dir": str(work / "executor" / task)}
    if kind == "local":
        _executor_class(kind)([step], **common, **values).run()
    elif kind == "ray":
        import ray

        address = values.pop("address", None)
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        _executor_class(kind)([step], **common, **values).run()
    else:
        activate = Path(sys.prefix) / "bin" / "activate"
        if not {"venv_path", "condaenv", "env_command"} & values.keys() and activate.is_file():
            values["venv_path"] = str(activate)
        executor = _executor_class(kind)(
            [step], **common, **{"mail_type": "NONE", "job_name": f"k2jax-{task}", **values}
        )
        executor.launch_merge_stats = lambda: None  # a job of its own, for statistics that are not ours
        executor.run()
        _wait_for_slurm(executor.job_id, recipe, work, task)


def _failure(work: Path, task: str, ranks: list[int], cause: Exception | None):
    """The causes that failed ranks wrote down."""
    reports = (read_report(work / "errors" / f"{task}-{rank:05d}.json") for rank in ranks)
    found = [report for report in reports if report is not None]
    problems = [problem for entry in found for problem in entry["problems"] or ()]
    if problems:
        return UserError(*problems)
    why = found[0]["error"] if found else f"{type(cause).__name__}: {cause}" if cause else "no rank says why"
    where = work / ("errors" if found else "executor")
    return RunFailed(
        f"task {task}: {len(ranks)} ranks have no result, first {ranks[0]}: {why}; more in {where}. "
        "The same command tries them again"
    )


def run_task(kind: str, workers: int, options: dict[str, str], recipe: Recipe, work: Path, task: str) -> None:
    """Run what is unfinished of a task. UserError or RunFailed if some of it cannot be done."""
    count, cause = num_ranks(recipe, task), None
    ranks = unfinished(work, task, count)
    if not ranks:
        return
    for rank in ranks:
        (work / "errors" / f"{task}-{rank:05d}.json").unlink(missing_ok=True)
    try:
        if (kind == "local" and workers == 1) or (kind == "local" and len(ranks) == 1):
            for rank in ranks:
                run_task_rank(str(work), task, rank)
        else:
            _run_on_datatrove(kind, workers, options, recipe, work, task)
    except (UserError, RunFailed):
        raise
    except Exception as error:  # whatever a rank or an executor raises: a bug of theirs keeps its trace in errors/
        cause = error
    if ranks := unfinished(work, task, count):
        raise _failure(work, task, ranks, cause) from cause
