"""What a task of srun knows of itself."""

import pytest

from zerobert.slurm import adopt_slurm, first_host

TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
}


def test_a_task_becomes_a_rank() -> None:
    environment = {**TASK, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    adopt_slurm(environment)
    got = {name: value for name, value in environment.items() if "SLURM" not in name}
    assert got == {
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20000 + (1234567 * 7 + 2) % 20000),
    }


def test_a_task_with_a_gpu_of_its_own_calls_it_0() -> None:
    environment = {**TASK, "CUDA_VISIBLE_DEVICES": "3"}
    adopt_slurm(environment)
    assert environment["LOCAL_RANK"] == "0"


def test_a_rendezvous_of_the_user_s_stays() -> None:
    environment = {**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    adopt_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**TASK, "RANK": "0"},  # torchrun or DeepSpeed inside of a task
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        # The script of an sbatch job: it has tasks, but is none.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"},
    ],
)
def test_elsewhere_nothing_is_changed(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node3", "node3"),
        ("node[07-12,20],login", "node07"),
        ("a1,a2", "a1"),
        ("rack[1]-gpu,b", "rack1-gpu"),
        ("n[3,5-7]", "n3"),
        ("rack[1-2]node[3,4],login", "rack1node3"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host
