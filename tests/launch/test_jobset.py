"""`k2jax launch jobset`: the manifest read as Kubernetes reads it, its pods started as the kubelet would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from k2jax.errors import UserError
from k2jax.launch.jobset import jobset_manifest
from k2jax.launch.manifest import Job

HOSTILE = (
    "'", '"', "a b", "$HOME", "$(K2JAX_COORDINATOR)", "$$(A)", "$(touch pwned)", "`touch pwned`", "line\n  image: evil",
    "\\",     "#", "{{name}}", "é€𝄞", "\x85\u2028\ufeff\x7f\t\x01", "", "--", "null", "- a: b",
)  # fmt: skip
TRAIN = ("train", "configs/tiny.py")
VARIABLES = tuple(f"V{n}={value}" for n, value in enumerate(HOSTILE))
# Every field that a manifest of ours may have, and its type: none is misspelled, none is misplaced. The published
# schema, which knows many more, is asked below where it is at hand.
STRING, NUMBER, STRINGS = (
    {"type": "string", "minLength": 1},
    {"type": "integer", "minimum": 0},
    {"type": "array", "items": {"type": "string"}},
)


def exactly(**properties) -> dict:
    """An object with some of these properties and no other; those in capitals' lists are lists."""
    return {"type": "object", "properties": properties, "additionalProperties": False, "minProperties": 1}


def several(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


QUANTITIES = {
    "type": "object",
    "additionalProperties": NUMBER,
    "propertyNames": {"enum": ["google.com/tpu", "nvidia.com/gpu"]},
}
CONTAINER = exactly(
    name=STRING,
    image=STRING,
    command=STRINGS,
    args=STRINGS,
    env=several(exactly(name=STRING, value={"type": "string"}, valueFrom=exactly(fieldRef=exactly(fieldPath=STRING)))),
    resources=exactly(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=several(exactly(name=STRING, mountPath=STRING)),
)
POD = exactly(
    restartPolicy={"const": "Never"},  # a podFailurePolicy needs it
    shareProcessNamespace={"type": "boolean"},
    terminationGracePeriodSeconds=NUMBER,
    nodeSelector={"type": "object", "additionalProperties": STRING},
    containers=several(CONTAINER),
    volumes=several(
        exactly(
            name=STRING, persistentVolumeClaim=exactly(claimName=STRING), emptyDir=exactly(medium={"const": "Memory"})
        )
    ),
)
POD_RULE = exactly(
    action={"const": "FailJob"},
    onExitCodes=exactly(containerName={"const": "k2jax"}, operator={"const": "In"}, values=several(NUMBER)),
    onPodConditions=several(exactly(type={"const": "DisruptionTarget"}, status={"const": "True"})),
)
JOB = exactly(
    completionMode={"const": "Indexed"},
    completions=NUMBER,
    parallelism=NUMBER,
    backoffLimit=NUMBER,
    podReplacementPolicy={"const": "Failed"},
    podFailurePolicy=exactly(rules=several(POD_RULE)),
    template=exactly(spec=POD),
)
JOBSET_RULE = exactly(
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=several({"enum": ["BackoffLimitExceeded", "PodFailurePolicy"]}),
    onJobFailureMessagePatterns=STRINGS,
)
JOBSET = exactly(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=exactly(name=STRING, annotations={"type": "object", "additionalProperties": STRING}),
    spec=exactly(
        network=exactly(enableDNSHostnames={"const": True}, publishNotReadyAddresses={"const": True}),
        failurePolicy=exactly(
            maxRestarts=NUMBER, restartStrategy={"enum": ["Recreate", "BlockingRecreate"]}, rules=several(JOBSET_RULE)
        ),
        replicatedJobs=several(exactly(name=STRING, replicas=NUMBER, template=exactly(spec=JOB))),
    ),
)


def manifest_of(
    job: Job, tpu: str | None = None, volumes: tuple[str, ...] = (), image: str = "registry.example/k2jax:1.0"
) -> dict:
    text = jobset_manifest(job, image, tpu, volumes)
    assert "\n{{" not in text
    return yaml.safe_load(text)


MANIFESTS = {
    "tpu": (Job(TRAIN, 32, run_dir="gs://bucket/run"), "v5p:4x4x4"),
    "gpu": (
        Job(TRAIN, 2, "gpus", "/runs/a", gpus=8, environment=("NCCL_DEBUG=WARN",)), None, ("runs=/runs", "data=/data"),
    ),
    "cpu": (Job(TRAIN, 4, "true", "s3://bucket/run", devices=2), None),
    "hostile": (
        Job((*TRAIN, *HOSTILE), 2, run_dir="/runs/$(x)'\"\n", devices=1, environment=VARIABLES), None, ("runs=/runs",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments", MANIFESTS.values(), ids=MANIFESTS)
def test_fields_are_spelled_and_placed_right(arguments):
    jsonschema.validate(manifest_of(*arguments), JOBSET)


def strict(schema: dict) -> dict:
    """An OpenAPI schema of Kubernetes that refuses fields it does not know, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: strict(value) for name, value in schema.items()}
    open_ended = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not open_ended:
        result["additionalProperties"] = False
    return result


@pytest.mark.skipif("JOBSET_CRD" not in os.environ, reason="JOBSET_CRD names no copy of jobset.x-k8s.io_jobsets.yaml")
@pytest.mark.parametrize("arguments", MANIFESTS.values(), ids=MANIFESTS)
def test_the_published_schema(arguments):
    crd = yaml.load(Path(os.environ["JOBSET_CRD"]).read_text(), yaml.CSafeLoader)
    [version] = [v for v in crd["spec"]["versions"] if v["name"] == "v1alpha2"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    manifest = manifest_of(*arguments)
    jsonschema.validate(manifest, schema)
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(jsonschema.ValidationError, match="terminationGracePeriod"):  # or it would take anything
        jsonschema.validate(manifest, schema)


def expanded(text: str, environment: dict[str, str]) -> str:
    """Kubernetes' expansion: $(NAME) is the variable if there is one, $$ is $."""
    one = re.compile(r"\$\$|\$\(([^)]*)\)", re.DOTALL)
    return one.sub(lambda match: "$" if match[0] == "$$" else environment.get(match[1], match[0]), text)


def pods_of(manifest: dict) -> list[tuple[str, dict, list[str]]]:
    """(host name, environment, argv) of every pod, as JobSet, the Job controller and the kubelet make them."""
    [job] = manifest["spec"]["replicatedJobs"]
    [container] = job["template"]["spec"]["template"]["spec"]["containers"]
    pods = []
    for slice_index in range(job["replicas"]):
        for index in range(job["template"]["spec"]["completions"]):
            environment = {"JOB_COMPLETION_INDEX": str(index), "PATH": os.environ["PATH"]}
            for variable in container["env"]:
                if "valueFrom" in variable:
                    assert "['jobset.sigs.k8s.io/job-index']" in variable["valueFrom"]["fieldRef"]["fieldPath"]
                    environment[variable["name"]] = str(slice_index)
                else:
                    environment[variable["name"]] = expanded(variable["value"], environment)
            argv = [expanded(argument, environment) for argument in container["command"] + container["args"]]
            name = manifest["metadata"]["name"]
            pods.append((f"{name}-{job['name']}-{slice_index}-{index}.{name}", environment, argv))
    return pods


@pytest.mark.parametrize(
    ("hosts", "tpu", "slices"),
    [(4, "v5p:2x2x4", 1), (8, "v5p:2x2x4", 2), (6, "v6e:2x4", 3), (3, None, 1), (1, None, 1)],
)
def test_pods_have_the_numbers_of_their_places_and_one_coordinator(tmp_path, hosts, tpu, slices):
    (tmp_path / "k2jax").write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
    )
    (tmp_path / "k2jax").chmod(0o755)
    job = Job(
        (*TRAIN, *HOSTILE),
        hosts,
        "x",
        "gs://b/r",
        devices=None if tpu else 2,
        environment=VARIABLES,
    )
    manifest = manifest_of(job, tpu)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == slices
    pods = pods_of(manifest)
    for number, (_, environment, argv) in enumerate(pods):
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
        done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        arguments, got = json.loads(done.stdout)
        assert arguments == ["launch", "host", "--", *TRAIN, *HOSTILE, "--train.run-dir", "gs://b/r"]
        assert [got[f"V{n}"] for n in range(len(HOSTILE))] == list(HOSTILE)
        assert got["K2JAX_COORDINATOR"] == f"{pods[0][0]}:61412"
        assert (got["K2JAX_PROCESS_ID"], got["K2JAX_NUM_PROCESSES"]) == (str(number), str(hosts))
        assert got.get("K2JAX_SIMULATE") == (None if tpu else "2")
    assert len(pods) == hosts and not (tmp_path / "pwned").exists()


def outcome(manifest: dict, code: int, disrupted: bool = False) -> str:
    """The JobSet's answer to a pod's end, by the documented order: pod rules, then JobSet's; the first that matches."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for number, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if code in rule.get("onExitCodes", {}).get("values", []):
            reason = "PodFailurePolicy"
            what = f"Container k2jax for pod default/x-0 failed with exit code {code}"
            message = f"{what} matching FailJob rule at index {number}"
            break
        if disrupted and "onPodConditions" in rule:
            reason, message = (
                "PodFailurePolicy",
                f"Pod default/x-0 has condition DisruptionTarget matching FailJob rule at index {number}",
            )
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_exit_codes():
    manifest = manifest_of(*MANIFESTS["tpu"])
    assert outcome(manifest, 2) == outcome(manifest, 2, disrupted=True) == "FailJobSet"
    assert outcome(manifest, 143) == outcome(manifest, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(manifest, 1) == outcome(manifest, 134) == outcome(manifest, 20) == "RestartJobSet"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_what_a_pod_is_given():
    def pod(manifest):
        return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]

    tpu = pod(manifest_of(Job(TRAIN, 4, run_dir="gs://b/r", grace=77), "v6e:4x4"))
    assert tpu["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert (
        tpu["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
        and tpu["terminationGracePeriodSeconds"] == 77
    )
    gpu = pod(manifest_of(*MANIFESTS["gpu"]))
    assert gpu["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8} and "nodeSelector" not in gpu
    assert {m["mountPath"]: m["name"] for m in gpu["containers"][0]["volumeMounts"]} == {
        "/runs": "volume-0", "/data": "volume-1", "/dev/shm": "shared-memory",
    }  # fmt: skip
    assert [v.get("persistentVolumeClaim", {}).get("claimName") for v in gpu["volumes"]] == ["runs", "data", None]
    cpu = manifest_of(*MANIFESTS["cpu"])
    assert cpu["metadata"] == {"name": "true"} and "volumes" not in pod(cpu)  # a string, not YAML's truth


@pytest.mark.parametrize(
    ("job", "tpu", "volumes", "message"),
    [
        (Job(TRAIN, 3, run_dir="gs://b/r"), "v5p:2x2x2", (), "--hosts 3: .* multiple of the 2 hosts .*nearest: 2 or 4"),
        (Job(TRAIN, 1, run_dir="gs://b/r"), "v9:2x2", (), "--tpu 'v9:2x2': must be GENERATION"),
        (Job(TRAIN, 1, run_dir="gs://b/r"), "v5p:2x2", (), "must have 3 numbers for v5p, such as v5p:4x4x4"),
        (Job(TRAIN, 1, run_dir="gs://b/r"), "v6e:1x1", (), "1 chips, must be a multiple of 4"),
        (Job(TRAIN, 1, run_dir="gs://b/r"), None, (), "give exactly one .none is given"),
        (Job(TRAIN, 1, run_dir="gs://b/r", gpus=8, devices=1), None, (), "exactly one .--gpus-per-host 8, --dev"),
        (Job(TRAIN, 1, devices=1), None, (), "--run-dir: is missing"),
        (Job(TRAIN, 1, run_dir="runs/x", devices=1), None, ("runs=/runs",), "--run-dir runs/x: must be gs://"),
        (Job(TRAIN, 1, run_dir="/runs2/x", devices=1), None, ("runs=/runs",), "--run-dir /runs2/x: must be gs://"),
        (Job(TRAIN, 1, run_dir="/runs/../x", devices=1), None, ("runs=/runs",), "--run-dir /runs/../x: must be gs://"),
        (Job(TRAIN, 1, run_dir="/r", devices=1), None, ("a=/r", "b=/r"), "--volume b=/r: /r is another volume's"),
        (Job(TRAIN, 1, run_dir="/r", devices=1), None, ("A b=/r",), "--volume 'A b=/r': must be CLAIM=/PATH"),
    ],
)  # fmt: skip
def test_mistakes(job, tpu, volumes, message):
    with pytest.raises(UserError, match=message) as error:
        jobset_manifest(job, "image", tpu, volumes)
    assert len(error.value.problems) == 1


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as error:
        jobset_manifest(Job((), 0, "A"), "image\nevil", "x", ("v",))
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "no command", "--hosts 0", "--name 'A'", "--volume 'v'", "--run-dir", "--image 'image\\nevil'", "--tpu 'x'",
    ]  # fmt: skip
