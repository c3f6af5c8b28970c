"""`k2jax launch jobset`: a JobSet of Kubernetes, on GPU nodes or on GKE's TPU slices."""

import json
import math
import posixpath
import re
from collections.abc import Sequence

from k2jax.errors import UserError
from k2jax.launch.distributed import COORDINATOR, NUM_PROCESSES, PORT
from k2jax.launch.manifest import Job, fill, job_problems

# GKE's names of the accelerators, and the dims of their topologies. Machine types of several hosts have 4 chips each.
_TPUS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v5p": ("tpu-v5p-slice", 3),
    "v6e": ("tpu-v6e-slice", 2),
    "tpu7x": ("tpu7x", 3),
}
_CHIPS = 4
_SCRIPT = 'export K2JAX_PROCESS_ID=$((SLICE_INDEX * PODS_OF_A_SLICE + JOB_COMPLETION_INDEX)); exec "$@"'
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # YAML takes them as escapes alone


def _quoted(value: object) -> str:
    """A value as JSON, which is YAML too, in one line."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def _verbatim(value: str) -> str:
    """`value` so that Kubernetes, which puts variables where $(NAME) stands, leaves it as it is."""
    return value.replace("$", "$$")


def _tpu_problem(tpu: str) -> str | None:
    generation, _, dims = tpu.partition(":")
    if generation not in _TPUS:
        return f"--tpu {tpu!r}: must be GENERATION:AxB[xC] with one of {', '.join(_TPUS)}"
    count = _TPUS[generation][1]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims) or dims.count("x") != count - 1:
        return (
            f"--tpu {tpu!r}: must have {count} numbers for {generation}, such as {generation}:{'x'.join('4' * count)}"
        )
    chips = math.prod(map(int, dims.split("x")))
    return f"--tpu {tpu}: {chips} chips, must be a multiple of {_CHIPS}, a host's" if chips % _CHIPS else None


def _hosts_of_slice(tpu: str) -> int:
    return math.prod(map(int, tpu.partition(":")[2].split("x"))) // _CHIPS


def _is_inside(path: str, folder: str) -> bool:
    if not (path.startswith("/") and folder.startswith("/")):
        return False
    return posixpath.commonpath([posixpath.normpath(path), posixpath.normpath(folder)]) == posixpath.normpath(folder)


def _volume_problems(volumes: Sequence[str], run_dir: str | None) -> list[str]:
    problems, paths = [], []
    for volume in volumes:
        claim, _, path = volume.partition("=")
        if not _CLAIM.fullmatch(claim) or not path.startswith("/") or ":" in path:
            problems.append(
                f"--volume {volume!r}: must be CLAIM=/PATH, of a PersistentVolumeClaim that all pods may write"
            )
        elif path in paths:
            problems.append(f"--volume {volume}: {path} is another volume's as well")
        paths.append(path)
    if run_dir is None:
        problems.append(
            "--run-dir: is missing; a pod's own files are lost with it: give a path in a --volume, or gs://"
        )
    elif not re.match(r"(gs|s3)://.", run_dir) and not any(_is_inside(run_dir, path) for path in paths):
        problems.append(
            f"--run-dir {run_dir}: must be gs://..., s3://... or an absolute path in a --volume CLAIM=/PATH"
        )
    return problems


def _problems(job: Job, image: str, tpu: str | None, volumes: Sequence[str]) -> list[str]:
    problems = job_problems(job) + _volume_problems(volumes, job.run_dir)
    if not _IMAGE.fullmatch(image):
        problems.append(f"--image {image!r}: must be a name such as registry.example/k2jax:1.0")
    given = {"--gpus-per-host": job.gpus, "--tpu": tpu, "--devices-per-host": job.devices}
    if sum(value is not None for value in given.values()) != 1:
        shown = (
            ", ".join(f"{option} {value}" for option, value in given.items() if value is not None) or "none is given"
        )
        problems.append(f"{', '.join(given)}: give exactly one ({shown}); the last are CPU devices")
    if tpu is not None and (problem := _tpu_problem(tpu)):
        problems.append(problem)
    elif tpu is not None and job.hosts > 0 and job.hosts % (hosts := _hosts_of_slice(tpu)):
        near = sorted({max(job.hosts // hosts, 1) * hosts, -(-job.hosts // hosts) * hosts})
        rule = f"must be a multiple of the {hosts} hosts of a slice {tpu}, {_CHIPS} chips each"
        problems.append(f"--hosts {job.hosts}: {rule}; nearest: {' or '.join(map(str, near))}")
    return problems


def _block(indent: int, key: str, lines: list[str]) -> str:
    """A key with lines below it, or a comment that says that there is nothing to say."""
    return "\n".join(
        " " * indent + line for line in ([f"{key}:", *(f"  {x}" for x in lines)] if lines else [f"# no {key}"])
    )


def _environment(job: Job, pods: int) -> list[str]:
    ours = {
        COORDINATOR: f"{job.name}-workers-0-0.{job.name}:{PORT}",
        NUM_PROCESSES: str(job.hosts),
        "PODS_OF_A_SLICE": str(pods),
        **job.simulated(),
    }
    theirs = {name: _verbatim(value) for name, value in job.variables().items()}
    lines = [f"- {{name: {_quoted(name)}, value: {_quoted(value)}}}" for name, value in (ours | theirs).items()]
    slice_index = "{fieldRef: {fieldPath: \"metadata.labels['jobset.sigs.k8s.io/job-index']\"}}"
    return [*lines, f'- {{name: "SLICE_INDEX", valueFrom: {slice_index}}}']


def _resources(job: Job, tpu: str | None) -> list[str]:
    if tpu is None and job.gpus is None:
        return []
    name, count = ("google.com/tpu", _CHIPS) if tpu is not None else ("nvidia.com/gpu", job.gpus)
    return [f"requests: {{{name}: {count}}}", f"limits: {{{name}: {count}}}"]


def _storage(job: Job, volumes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The container's volumeMounts and the pod's volumes."""
    mounts, claims = [], []
    for number, volume in enumerate(volumes):
        claim, _, path = volume.partition("=")
        mounts.append(f"- {{name: volume-{number}, mountPath: {_quoted(path)}}}")
        claims.append(f"- {{name: volume-{number}, persistentVolumeClaim: {{claimName: {_quoted(claim)}}}}}")
    if job.gpus is not None:  # NCCL's, of which a container has 64 MiB by default
        mounts.append("- {name: shared-memory, mountPath: /dev/shm}")
        claims.append("- {name: shared-memory, emptyDir: {medium: Memory}}")
    return mounts, claims


def _placement(tpu: str | None) -> tuple[list[str], list[str]]:
    """The JobSet's annotations and the pods' nodeSelector."""
    if tpu is None:
        return [], []
    generation, _, topology = tpu.partition(":")
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool  # a node pool is a slice"
    labels = {"gke-tpu-accelerator": _TPUS[generation][0], "gke-tpu-topology": topology}
    return [annotation], [f"cloud.google.com/{name}: {_quoted(value)}" for name, value in labels.items()]


def jobset_manifest(job: Job, image: str, tpu: str | None = None, volumes: Sequence[str] = ()) -> str:
    """The JobSet. tpu: a slice such as v5p:4x4x4, as many of them as the hosts make; volumes: CLAIM=/PATH each.

    Raises UserError with everything that is wrong.
    """
    if problems := _problems(job, image, tpu, volumes):
        raise UserError(*problems)
    slices = 1 if tpu is None else job.hosts // _hosts_of_slice(tpu)
    pods = job.hosts // slices
    mounts, claims = _storage(job, volumes)
    annotations, selector = _placement(tpu)
    values = {
        "name": job.name,
        "image": _quoted(image),
        "slices": str(slices),
        "pods": str(pods),
        "grace": str(job.grace),
        "max_restarts": str(job.max_restarts),
        "script": _quoted(_verbatim(_SCRIPT)),
        "command": _quoted([_verbatim(argument) for argument in job.full_command()]),
        "annotations": _block(2, "annotations", annotations),
        "node_selector": _block(14, "nodeSelector", selector),
        "environment": _block(18, "env", _environment(job, pods)),
        "resources": _block(18, "resources", _resources(job, tpu)),
        "mounts": _block(18, "volumeMounts", mounts),
        "volumes": _block(14, "volumes", claims),
    }
    return fill("jobset.yaml", values)
