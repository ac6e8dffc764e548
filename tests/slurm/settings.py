"""The configuration files of a throw-away Slurm: small, fast to react, no accounting, no cgroups.

Timers are seconds where a site has minutes, so that a test sees a lost node or a requeue soon.
"""

import random
import socket
from dataclasses import dataclass, field
from pathlib import Path

PARTITIONS = {
    "main": "Default=YES PriorityTier=5 PreemptMode=OFF",
    "low": "PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}",
    "high": "PriorityTier=10 PreemptMode=OFF",
}
# Above the ports where the jobs' ranks meet (20000-29999), below the kernel's own (32768-60999).
PORTS = range(30000, 32700)


@dataclass(frozen=True)
class Settings:
    """What a test may choose. Nodes are called n1, n2, ...; all partitions hold all of them.

    Attributes:
        nodes: how many.
        gpus: fake ones a node: Slurm counts and assigns them, nothing is behind them.
        cpus: of a node, as many as one likes: nothing is bound or limited.
        grace_s: from a preemption's warning to its TERM (partition low).
        kill_wait_s: from TERM to KILL.
        slurmd_timeout_s: a silent node counts as down after this.
        cred_expire_s: a requeued job waits this long and one second more.
        preempt_signal: preemption warns with the signal of `--signal` instead of TERM.
        options: further lines of slurm.conf, which win over those here.
    """

    nodes: int = 2
    gpus: int = 0
    cpus: int = 8
    grace_s: int = 5
    kill_wait_s: int = 5
    slurmd_timeout_s: int = 8
    cred_expire_s: int = 5
    preempt_signal: bool = False
    options: dict[str, str] = field(default_factory=dict)

    @property
    def node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Address:
    """Where a daemon is met."""

    host: str
    address: str
    port: int


def loopback_addresses(nodes: list[str]) -> dict[str, Address]:
    """Return where controller ("ctl") and nodes listen when all share this machine's network."""
    host = socket.gethostname().split(".")[0]
    names = ["ctl", *nodes]
    return {
        name: Address(host, "127.0.0.1", port)
        for name, port in zip(names, _free_ports(len(names)), strict=True)
    }


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports in {PORTS}")


def write_configuration(folder: Path, settings: Settings, addresses: dict[str, Address]) -> Path:
    """Write slurm.conf and gres.conf below `folder`; return the path of slurm.conf."""
    lines = [f"{key}={value}" for key, value in _options(folder, settings, addresses).items()]
    has = f"Sockets=1 CoresPerSocket={settings.cpus} RealMemory={1000 * settings.cpus}"
    has += f" Gres=gpu:{settings.gpus}" if settings.gpus else ""
    for name in settings.node_names:
        at = addresses[name]
        where = f"NodeHostname={at.host} NodeAddr={at.address} Port={at.port}"
        lines.append(f"NodeName={name} {where} {has}")
    for name, options in PARTITIONS.items():
        options = options.format(grace_s=settings.grace_s)
        lines.append(f"PartitionName={name} Nodes=ALL DefaultTime=10 MaxTime=INFINITE {options}")
    path = folder / "slurm.conf"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "plugstack.conf").touch()  # else the one of the machine's own Slurm is read
    if settings.gpus:
        _write_gpus(folder, settings)
    return path


def _options(folder: Path, settings: Settings, addresses: dict[str, Address]) -> dict[str, str]:
    controller = addresses["ctl"]
    options = {
        "ClusterName": "tests",
        "SlurmctldHost": f"{controller.host}({controller.address})",
        "SlurmctldPort": str(controller.port),
        # Ranks derive their port from the job's number: two clusters must not count alike.
        "FirstJobId": str(random.randrange(1000, 9000)),
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire={settings.cred_expire_s}",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd-%n.log",
        "PlugStackConfig": f"{folder}/plugstack.conf",
        "JobCompType": "jobcomp/none",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SlurmdParameters": "config_overrides",  # more CPUs than there are
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": "1000",  # else the first small job takes a node's whole memory
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,"
        "bf_interval=1,bf_resolution=1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "KillWait": str(settings.kill_wait_s),
        "SlurmdTimeout": str(settings.slurmd_timeout_s),
        "MessageTimeout": "5",
        "TCPTimeout": "2",
        "BatchStartTimeout": "10",
        "InactiveLimit": "20",
        "UnkillableStepTimeout": "20",
        "MinJobAge": "86400",  # ended jobs stay visible: there is no accounting to ask
        "ReturnToService": "2",  # a node that is back is used again
    }
    if settings.preempt_signal:
        options["SlurmctldParameters"] = "preempt_send_user_signal"
    if settings.gpus:
        options["GresTypes"] = "gpu"
    return options | settings.options


def _write_gpus(folder: Path, settings: Settings) -> None:
    """Slurm insists on device files: links to the null device will do."""
    devices = [folder / f"gpu{number}" for number in range(settings.gpus)]
    for device in devices:
        device.symlink_to("/dev/null")
    lines = ["AutoDetect=off"]
    for name in settings.node_names:
        lines += [f"NodeName={name} Name=gpu File={device}" for device in devices]
    (folder / "gres.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
