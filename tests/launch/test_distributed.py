"""Finding the processes of a run, by options, variables and clusters; messages for what does not fit."""

import pytest

from k2jax.errors import UserError
from k2jax.launch.distributed import membership, use_cpu_devices

OPTIONS = {"K2JAX_COORDINATOR": "node1:4000", "K2JAX_NUM_PROCESSES": 4, "K2JAX_PROCESS_ID": 2}
SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu-[007-010,012]", "SLURM_NTASKS": "5", "SLURM_PROCID": "3"}


def found(options=(), environ=()):
    part = membership(dict(options), dict(environ))
    return part and (part.coordinator, part.num_processes, part.process_id, part.local_device_ids)


def refused(options=(), environ=()) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        membership(dict(options), dict(environ))
    return caught.value.problems


def test_a_process_alone():
    assert found() is None
    assert found(environ={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None  # a batch shell, not a task of srun
    assert found(environ=SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert found({"K2JAX_NUM_PROCESSES": 1}, SLURM) is None  # asked to be alone, inside a cluster


def test_options_and_variables():
    assert found(OPTIONS) == ("node1:4000", 4, 2, None)
    variables = {name: str(value) for name, value in OPTIONS.items()}
    assert found(environ=variables | SLURM) == ("node1:4000", 4, 2, None)
    assert found({"K2JAX_PROCESS_ID": 0}, variables) == ("node1:4000", 4, 0, None)
    alone = {"K2JAX_COORDINATOR": "[::1]:4000", "K2JAX_NUM_PROCESSES": 1, "K2JAX_PROCESS_ID": 0}
    assert found(alone) == ("[::1]:4000", 1, 0, None)
    pod = {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert found(environ=pod | {"K2JAX_COORDINATOR": "run-0.run:4000", "K2JAX_NUM_PROCESSES": "4"})[2] == 3


def test_clusters():
    assert found(environ=SLURM) == ("gpu-007:61441", 5, 3, None)
    for text, host in (("a", "a"), ("a,b", "a"), ("n[3,5]", "n3"), ("n[3-5],m1", "n3")):
        assert found(environ=SLURM | {"SLURM_STEP_NODELIST": text})[0] == f"{host}:61441"
    many = {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "6", "SLURM_NTASKS": "16"}
    assert found(environ=SLURM | many)[3] == (6,)  # of eight tasks on a host each has one GPU
    mpi = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert found(environ=mpi | uri) == ("10.96.0.1:61440", 4, 1, None)
    assert "mpirun -x K2JAX_COORDINATOR=HOST:PORT" in refused(environ=mpi)[0]  # Open MPI 5
    sky = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NUM_NODES": "2"}
    assert found(environ=sky) == ("10.0.0.4:61412", 2, 1, None)
    torch = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "RANK": "1", "WORLD_SIZE": "2"}
    assert found(environ=torch) == ("n1:29501", 2, 1, None)


def test_every_wrong_option_is_named():
    problems = refused({"K2JAX_COORDINATOR": "node1", "K2JAX_NUM_PROCESSES": 0})
    assert len(problems) == 3
    assert "--process-id: is missing, or K2JAX_PROCESS_ID" in problems[0]
    assert problems[1] == "--num-processes 0: must be a number from 1"
    assert problems[2] == "--coordinator 'node1': must be HOST:PORT with a port of 1 to 65535"
    assert refused(OPTIONS | {"K2JAX_PROCESS_ID": 4}) == ("--process-id 4: must be 0 to 3, of 4 processes",)
    assert "K2JAX_NUM_PROCESSES 'four': must be" in refused(environ=OPTIONS | {"K2JAX_NUM_PROCESSES": "four"})[0]
    pod = {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert "set K2JAX_COORDINATOR and K2JAX_NUM_PROCESSES" in refused(environ=pod)[0]
    assert "variables that do not fit together" in refused(environ=SLURM | {"SLURM_NTASKS": "x"})[0]


def test_devices_must_be_some():
    for count in (0, -1, "two", ""):
        with pytest.raises(UserError, match="must be at least 1"):
            use_cpu_devices(count)
