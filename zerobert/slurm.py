"""Ranks that SLURM's `srun` starts itself, without a launcher of ours or DeepSpeed's."""

import re
from collections.abc import MutableMapping


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Take rank, world size and rendezvous from a task of `srun`, unless a launcher has set them.

    Source: srun(1), OUTPUT ENVIRONMENT VARIABLES. Not tried under SLURM itself.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    # As `4(x2),3`: tasks a node.
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    has_one_gpu = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        # Where srun gives each task one GPU, that is number 0 to it.
        LOCAL_RANK="0" if has_one_gpu else environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=tasks[0] if tasks else "1",
    )
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20000 + (job * 7 + step) % 20000))


def first_host(nodes: str) -> str:
    """The first of a list as SLURM writes it: `node[07-12,20],login` begins with `node07`."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)  # to the first comma outside of brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)
