"""Who am I: rank, world size and rendezvous, from torchrun, deepspeed, Slurm or nothing at all.

Imports no torch: configuration errors are found, and printed once, before anything heavy starts.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from data_tools.errors import LaunchError, LecternError
from train.rendezvous import find_rendezvous

SECONDS_FOR_RANK_0_TO_SPEAK = 5


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    num_cores: int | None = None  # bound to this rank alone; None: the ranks of a node share theirs

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks."""
        return self.rank == 0


def find_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Read the ranks that a launcher has set.

    torchrun and deepspeed set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_*; under srun with one task
    per rank they come from SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS, and the rendezvous, where
    no job script has exported it, from the first node and the job's id. Without a launcher there is
    one rank.

    Raises:
        LaunchError: if the variables contradict each other or an address is missing.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        local_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or "1"
        values = (env["RANK"], env.get("LOCAL_RANK", "0"), env.get("WORLD_SIZE"), local_size)
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE")
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
        values = (env["SLURM_PROCID"], env["SLURM_LOCALID"], env.get("SLURM_NTASKS"), per_node)
    else:
        return Ranks(master_port=free_port())
    numbers = [_number(name, value) for name, value in zip(names, values, strict=True)]
    rank, local_rank, world_size, per_node_count = numbers
    if not 0 <= rank < world_size:
        raise LaunchError(f"{names[0]}={rank} with {names[2]}={world_size}; expected 0 to N - 1")
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT", "29500")
    if world_size > 1 and not address and "SLURM_STEP_ID" in env:
        address, job_port = find_rendezvous(env)
        port = env.get("MASTER_PORT", str(job_port))
    if world_size > 1 and not address:
        raise LaunchError(
            f"MASTER_ADDR is not set for {world_size} ranks; start with torchrun, deepspeed or "
            "srun, one task a rank, as slurm/stage1.sh does"
        )
    cores = env.get("SLURM_CPUS_PER_TASK") if "RANK" not in env else None
    return Ranks(
        rank,
        local_rank,
        world_size,
        per_node_count,
        address or "127.0.0.1",
        _number("MASTER_PORT", port),
        _number("SLURM_CPUS_PER_TASK", cores) if cores else None,
    )


def export_ranks(ranks: Ranks, environment: MutableMapping[str, str]) -> None:
    """Set what torch.distributed and DeepSpeed read, and a fair share of threads.

    Must run before torch is imported: OMP_NUM_THREADS is read once. deepspeed leaves it unset, and
    every rank would take all cores.
    """
    environment["RANK"] = str(ranks.rank)
    environment["LOCAL_RANK"] = str(ranks.local_rank)
    environment["WORLD_SIZE"] = str(ranks.world_size)
    environment["MASTER_ADDR"] = ranks.master_addr
    environment["MASTER_PORT"] = str(ranks.master_port)
    threads = ranks.num_cores or len(os.sched_getaffinity(0)) // ranks.local_size
    environment.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")


def stop_all(error: LecternError, rank: int) -> None:
    """End every rank with the error's code, the message printed once.

    Launchers kill the other ranks at the first exit: those that are not rank 0 wait, so that rank 0
    can speak before it is killed, and are killed themselves meanwhile.
    """
    if rank != 0:
        time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
    # Still alive: rank 0 did not have this error, so it must be told here.
    prefix = f"[rank {rank}] " if rank else ""
    print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def free_port() -> int:
    """Return a port that nobody listens on: two runs on one machine do not collide."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _number(name: str, value: str | None) -> int:
    if value is None or not value.isdigit():
        raise LaunchError(f"{name}={value!r}; expected a whole number, set by the launcher")
    return int(value)
