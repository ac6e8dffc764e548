"""What a job was granted, how many ranks that makes, and the srun command of a step in it."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from data_tools.errors import LaunchError
from launch import slurm
from train.rendezvous import head_address, rendezvous_port

PARTNERS_WAIT_S = 60  # srun ends the others so long after the first rank has left with 0


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job and how ranks are laid over them.

    Attributes:
        job: id.
        restart: how often it was requeued before.
        nodes: names, the first one leads.
        gpus_per_node: 0 without GPUs.
        ranks_per_node: one a GPU; else one a task that was asked for.
        cpus_per_rank: cores.
        container: options and prefix that put a command of a step into a container.
    """

    job: str
    restart: int
    nodes: tuple[str, ...]
    gpus_per_node: int
    ranks_per_node: int
    cpus_per_rank: int
    container: "Container" = field(default_factory=lambda: Container())

    @property
    def num_ranks(self) -> int:
        """Ranks in all."""
        return self.ranks_per_node * len(self.nodes)

    @property
    def master_port(self) -> int:
        """The port at which ranks meet."""
        return rendezvous_port(self.job, self.restart)

    @property
    def master_addr(self) -> str:
        """The address at which ranks meet; that of slurm/site.sh where names do not resolve.

        Raises:
            LaunchError: if there is none.
        """
        try:
            return head_address(self.nodes[0])
        except LaunchError:
            if address := os.environ.get("MASTER_ADDR"):
                return address
            raise

    def on(self, nodes: Sequence[str]) -> "Allocation":
        """Return the same for some of the nodes."""
        return replace(self, nodes=tuple(node for node in self.nodes if node in set(nodes)))

    def step(self, command: Sequence[str], *, per_node: int | None = None) -> list[str]:
        """Return the command of a step.

        Args:
            command: what every task runs.
            per_node: tasks a node, each on its own and with every core of the node; None: one task
                a rank, all of which end when one fails.
        """
        tasks = per_node or self.ranks_per_node
        cpus = self.cpus_per_rank * self.ranks_per_node // tasks
        options = [
            "srun",
            "--export=ALL",  # sbatch --export=NONE would hold for our steps as well
            f"--nodes={len(self.nodes)}",
            f"--nodelist={','.join(self.nodes)}",
            f"--ntasks={tasks * len(self.nodes)}",
            f"--ntasks-per-node={tasks}",
            f"--cpus-per-task={max(1, cpus)}",
        ]
        if self.gpus_per_node:  # asked for again: the GPUs of an exclusive job are not its steps'
            options.append(f"--gpus-per-node={self.gpus_per_node}")
        if per_node is None:
            options += ["--kill-on-bad-exit=1", f"--wait={PARTNERS_WAIT_S}"]
        else:
            options += ["--kill-on-bad-exit=0", "--overlap"]
        return [*options, *self.container.options, *self.container.prefix, *command]

    def __str__(self) -> str:
        """Return what was resolved, for the log."""
        return (
            f"job {self.job}, start {self.restart + 1}: {_count(self.num_ranks, 'rank')} on "
            f"{_count(len(self.nodes), 'node')} ({','.join(self.nodes)}), "
            f"{_count(self.gpus_per_node, 'GPU')} a node, "
            f"{self.cpus_per_rank} CPUs a rank, rendezvous at {self.master_addr}:{self.master_port}"
        )


@dataclass(frozen=True)
class Container:
    """How a step gets into the image that the site names; nothing without one.

    Attributes:
        options: of srun (pyxis).
        prefix: before the command (apptainer).
        python: the interpreter inside, or ours.
    """

    options: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    python: str = sys.executable


def find_container(env: Mapping[str, str]) -> Container:
    """Read LECTERN_CONTAINER (pyxis) or LECTERN_APPTAINER of slurm/site.sh.

    The clone is mounted at its own path, so that the paths of a configuration hold inside as well;
    LECTERN_CONTAINER_MOUNTS names more, as /data:/data,/models:/models.

    Raises:
        LaunchError: if both are set.
    """
    image, sif = env.get("LECTERN_CONTAINER", ""), env.get("LECTERN_APPTAINER", "")
    if not image and not sif:
        return Container(python=env.get("LECTERN_PYTHON") or sys.executable)
    if image and sif:
        raise LaunchError("slurm/site.sh sets LECTERN_CONTAINER and LECTERN_APPTAINER: keep one")
    here = os.getcwd()
    mounts = [f"{here}:{here}", *filter(None, env.get("LECTERN_CONTAINER_MOUNTS", "").split(","))]
    python = env.get("LECTERN_CONTAINER_PYTHON", "python3")
    if image:
        options = (
            f"--container-image={image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={here}",
            "--no-container-mount-home",
        )
        return Container(options=options, python=python)
    binds = [part for mount in mounts for part in ("--bind", mount)]
    return Container(
        prefix=("apptainer", "exec", "--nv", "--pwd", here, *binds, sif), python=python
    )


def from_environment(env: Mapping[str, str] | None = None) -> Allocation:
    """Return what this job was granted; to be called in its batch script.

    Raises:
        LaunchError: outside of a job, or if each rank would see one GPU only.
    """
    env = os.environ if env is None else env
    if "SLURM_JOB_ID" not in env or "SLURM_JOB_NODELIST" not in env:
        raise LaunchError("this runs inside a job: submit it with sbatch slurm/NAME.sh")
    if env.get("SLURM_GPUS_PER_TASK"):
        raise LaunchError(
            "ask for --gpus-per-node instead of --gpus-per-task: every rank must see all GPUs of "
            "its node"
        )
    nodes = tuple(slurm.hostnames(env["SLURM_JOB_NODELIST"]))
    gpus = count_gpus(env)
    ranks = gpus or count_tasks(env, len(nodes))
    return Allocation(
        job=env["SLURM_JOB_ID"],
        restart=int(env.get("SLURM_RESTART_COUNT") or 0),  # unset, not 0, in the first run
        nodes=nodes,
        gpus_per_node=gpus,
        ranks_per_node=ranks,
        cpus_per_rank=count_cpus(env, ranks),
        container=find_container(env),
    )


def count_gpus(env: Mapping[str, str]) -> int:
    """Return the GPUs of a node: what was asked for, its type cut off, else all that was granted.

    An exclusive job is granted every GPU of its nodes.
    """
    count = env.get("SLURM_GPUS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE") or "0"
    return int(count.rpartition(":")[2])


def count_tasks(env: Mapping[str, str], num_nodes: int) -> int:
    """Return the tasks of a node that were asked for; one if nothing was said.

    Raises:
        LaunchError: if they are not as many on every node.
    """
    if per_node := env.get("SLURM_NTASKS_PER_NODE"):
        return int(per_node)
    tasks = int(env.get("SLURM_NTASKS") or num_nodes)
    if tasks % num_nodes:
        raise LaunchError(
            f"{tasks} tasks on {num_nodes} nodes: ask for --ntasks-per-node, the same on every node"
        )
    return tasks // num_nodes


def count_cpus(env: Mapping[str, str], ranks_per_node: int) -> int:
    """Return the cores of a rank: what was asked for, else its share of the smallest node."""
    if asked := env.get("SLURM_CPUS_PER_TASK"):
        return int(asked)
    counts = re.sub(r"\(x\d+\)", "", env.get("SLURM_JOB_CPUS_PER_NODE", "1"))  # 64(x3),32
    return max(1, min(int(count) for count in counts.split(",")) // ranks_per_node)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
