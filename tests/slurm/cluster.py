"""A real Slurm cluster of the tests' own: its daemons run as processes of ours, in one folder.

    python -m tests.slurm.cluster -- sbatch --wait slurm/stage1.sh     # as on a login node
    python -m tests.slurm.cluster --nodes 3 --gpus 2 --mode netns -- bash

    with Cluster(folder, nodes=2) as cluster:
        job = cluster.submit(["--nodes=2"], "slurm/stage1.sh", "my/stage1.yaml")
        cluster.kill_node("n2")
        assert job.wait() == ("COMPLETED", "0:0")

Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge; no service of them has
to run. There are no cgroups: CPUs, memory and devices are counted but not limited.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tests.launches import ROOT
from tests.slurm.jobs import Job, find_processes, wait_until
from tests.slurm.machines import CONTROLLER, Loopback, Namespaces
from tests.slurm.settings import Settings, write_configuration

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
MODES = ("loopback", "netns")
# Variables of the job or site that the tests run in, and of the harness, which keeps to loopback.
FOREIGN = ("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "GLOO_")
MAX_FOLDER = 70  # characters; the path of a unix socket may have 107
USABLE = {"idle", "mixed", "allocated"}
BRING_UP_S, END_S = 40.0, 20.0


class ClusterError(RuntimeError):
    """The cluster did not come up, or a command on it failed."""


class Cluster:
    """A context manager that brings a cluster up in `folder` (empty or new), and takes it down.

    Args:
        folder: for everything the cluster writes, removed at the end; at most 70 characters.
        mode: "loopback", or "netns": see tests/slurm/machines.py.
        settings: those of `Settings`.
    """

    def __init__(self, folder: Path, *, mode: str = "loopback", **settings: Any) -> None:
        self.folder = folder.resolve()
        if len(str(self.folder)) > MAX_FOLDER:
            raise ClusterError(f"{self.folder} is too long for a unix socket below it")
        self.settings = Settings(**settings)
        self.nodes = self.settings.node_names
        self.mode = mode
        self._config = self.folder / "slurm.conf"
        self._daemons: dict[str, psutil.Popen] = {}
        self._machines: Loopback | Namespaces

    def __enter__(self) -> "Cluster":
        for name in ("log", "state", "spool", "jobs"):
            (self.folder / name).mkdir(parents=True)
        self._machines = (
            Loopback(self.nodes) if self.mode == "loopback" else Namespaces(self.nodes, self.folder)
        )
        try:
            self._bring_up()
        except BaseException as error:
            error.add_note(self.logs())
            self.down()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    def _bring_up(self) -> None:
        write_configuration(self.folder, self.settings, self._machines.addresses)
        self._machines.power_on(CONTROLLER)
        key, socket = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": key, "socket": socket, "seed-file": self.folder / "munge.seed"}
        files |= {"pid-file": self.folder / "munge.pid", "log-file": self.folder / "log/munged.log"}
        options = [f"--{option}={path}" for option, path in files.items()]
        self._start("munged", CONTROLLER, "munged", "--foreground", "--force", *options)
        wait_until(socket.exists, BRING_UP_S, lambda: "munged makes no socket")
        self.start_controller()
        for node in self.nodes:
            self._power_on(node)
        self.ready()

    def ready(self, timeout_s: float = BRING_UP_S) -> None:
        """Wait until every node takes jobs."""

        def is_ready() -> bool:
            states = self._node_states()
            return all(states.get(node) in USABLE for node in self.nodes)

        wait_until(is_ready, timeout_s, lambda: f"the nodes are {self._node_states()}")

    def _node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    # --- as on the login node

    def environment(self) -> dict[str, str]:
        """Return the variables of a user of this cluster: ours, but nothing of another Slurm."""
        kept = {name: v for name, v in os.environ.items() if not name.startswith(FOREIGN)}
        return kept | {"SLURM_CONF": str(self._config)}

    def command(self, *command: str) -> list[str]:
        """Return the command that runs a command on the login node, given `environment`."""
        return [*self._machines.enter(CONTROLLER), *command]

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> str:
        """Run a command as on the login node, in the clone; return its stdout.

        Raises:
            ClusterError: if it fails, with what it printed.
        """
        result = subprocess.run(
            self.command(*command),
            cwd=ROOT,
            env=self.environment() | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if result.returncode != 0:
            said = (result.stdout + result.stderr).strip()
            raise ClusterError(f"{' '.join(command)}: code {result.returncode}: {said}")
        return result.stdout

    def submit(
        self,
        options: Sequence[str],
        script: str,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> Job:
        """Submit a script; its log lies in the cluster's folder.

        Args:
            options: of sbatch.
            script: a path as seen from `cwd`, or the text of a script, which begins with #!.
            arguments: of the script.
            env: further variables.
            cwd: the folder that sbatch is called in.
        """
        if script.startswith("#!"):
            count = len(list(self.folder.glob("jobs/script-*")))
            path = self.folder / "jobs" / f"script-{count}.sh"
            path.write_text(script, encoding="utf-8")
            script = str(path)
        is_array = any(option.startswith(("--array", "-a")) for option in options)
        output = f"--output={self.folder}/jobs/{'%A_%a' if is_array else '%j'}.out"
        call = ["sbatch", "--parsable", f"--chdir={cwd}", output, *options, script, *arguments]
        number = self.run(*call, env=env).strip()
        return Job(number, self.folder / "jobs" / f"{number}.out", self.run)

    # --- what may happen to a cluster

    def kill_node(self, node: str) -> None:
        """Cut a node's power: all its processes are gone at once."""
        self._machines.power_off(node)
        self._end(lambda: self._processes(node))

    def stop_slurmd(self, node: str) -> None:
        """Kill a node's slurmd; the steps of its jobs run on."""
        self._end(lambda: [p for p in self._daemons_of(node) if p.name() == "slurmd"])

    def start_node(self, node: str) -> None:
        """Switch a node, or only its slurmd, on again, and wait until it takes jobs."""
        self._power_on(node)
        self.ready()

    def cut_network(self, node: str) -> None:
        """Pull a node's cable (netns): it runs on, and nobody hears of it."""
        self._machines.connect(node, False)

    def join_network(self, node: str) -> None:
        """Plug a node's cable in again (netns) and wait until the node takes jobs."""
        self._machines.connect(node, True)
        self.ready()

    def kill_controller(self, *, is_graceful: bool = True) -> None:
        """End slurmctld; if not gracefully, it forgets the jobs and ends of its last seconds."""
        controller = self._daemons.pop("slurmctld")
        controller.send_signal(signal.SIGTERM if is_graceful else signal.SIGKILL)
        controller.wait(END_S)

    def start_controller(self) -> None:
        """Start slurmctld, with what it wrote before, and wait until it answers."""
        self._start("slurmctld", CONTROLLER, "slurmctld", "-D", "-f", str(self._config))

        def answers() -> bool:
            assert self._daemons["slurmctld"].poll() is None, "slurmctld has ended"
            ping = self.command("scontrol", "ping")
            return b"UP" in subprocess.run(ping, env=self.environment(), capture_output=True).stdout

        wait_until(answers, BRING_UP_S, lambda: "slurmctld does not answer")

    def restore(self) -> None:
        """Cancel every job and bring back whatever is down."""
        if "slurmctld" not in self._daemons:
            self.start_controller()
        for node in self.nodes:
            self._power_on(node)
            if self.mode == "netns":
                self._machines.connect(node, True)
        self.run("scancel", "--user=root")
        wait_until(lambda: not self._queue(), BRING_UP_S, lambda: f"still there: {self._queue()}")
        self._end(self._left_behind)
        self.ready()

    def _queue(self) -> str:
        return self.run("squeue", "-h", "-o", "%i %T")

    # --- processes

    def _power_on(self, node: str) -> None:
        self._machines.power_on(node)
        slurmd = self._daemons.get(f"slurmd-{node}")
        if slurmd is None or slurmd.poll() is not None:
            (self.folder / "spool" / node).mkdir(exist_ok=True)
            self._start(f"slurmd-{node}", node, "slurmd", "-D", "-N", node, "-f", str(self._config))

    def _start(self, name: str, machine: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as output:
            self._daemons[name] = psutil.Popen(
                [*self._machines.enter(machine), *command],
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _daemons_of(self, node: str) -> list[psutil.Process]:
        """Return a node's slurmd and slurmstepd; these write their name over their environment."""
        log = str(self.folder / "log" / f"slurmd-{node}.log")
        found = []
        for process in psutil.process_iter():
            try:
                is_daemon = process.name() in ("slurmd", "slurmstepd")
                if is_daemon and any(file.path == log for file in process.open_files()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue  # it has ended meanwhile
        return sorted(found, key=lambda process: process.name() != "slurmd")

    def _processes(self, node: str) -> list[psutil.Process]:
        """Return a node's daemons, then its jobs' processes, with their descendants.

        In this order they are killed: no daemon is left to report the end of a process.
        """
        of_jobs = {"SLURM_CONF": str(self._config), "SLURMD_NODENAME": node}
        found = {process: None for process in self._daemons_of(node) + find_processes(of_jobs)}
        for process in list(found):
            try:
                found |= dict.fromkeys(process.children(recursive=True))
            except psutil.NoSuchProcess:
                continue  # it has just ended
        return [process for process in found if process.is_running()]

    def _left_behind(self) -> list[psutil.Process]:
        """Return what has left its job, and the steps that the controller has forgotten."""
        processes = [process for node in self.nodes for process in self._processes(node)]
        return [process for process in processes if process.name() != "slurmd"]

    def _end(self, find: Callable[[], list[psutil.Process]]) -> None:
        """Kill what `find` finds until it finds nothing; psutil spares a reused process id."""

        def is_gone() -> bool:
            processes = find()
            for process in processes:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            return not processes

        wait_until(is_gone, END_S, lambda: f"these do not end: {find()}", 0.05)
        for daemon in self._daemons.values():
            daemon.poll()  # no zombies

    def logs(self, num_lines: int = 15) -> str:
        """Return the ends of the daemons' logs."""
        parts = []
        for path in sorted((self.folder / "log").iterdir()):
            if path.suffix == ".out" and path.with_suffix(".log").exists():
                continue  # the same once more
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            parts.append("\n".join([f"--- {path.name}", *lines[-num_lines:]]))
        return "\n".join(parts)

    def down(self) -> None:
        """End every process of the cluster, jobs included, and remove its folder."""
        for node in self.nodes:
            self.kill_node(node)
        for daemon in self._daemons.values():
            if daemon.poll() is None:
                daemon.terminate()  # not kill: slurmctld has a child to collect
                daemon.wait(END_S)
        self._machines.power_off(CONTROLLER)
        shutil.rmtree(self.folder)


def slurm_missing() -> str:
    """Return why no cluster can be brought up here, or ""."""
    packages = {p for program, p in PROGRAMS.items() if shutil.which(program) is None}
    if packages:
        return f"Debian packages to install: {' '.join(sorted(packages))}"
    return "" if os.geteuid() == 0 else "starting slurmd and munged needs root"


def main() -> None:
    """Bring a cluster up, run a command on its login node, take it down; exit with its code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0, help="fake ones a node")
    parser.add_argument("--mode", choices=MODES, default="loopback")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    if reason := slurm_missing():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # takes it down too
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    sizes = {"nodes": arguments.nodes, "gpus": arguments.gpus}
    with Cluster(folder, mode=arguments.mode, **sizes) as cluster:
        call = cluster.command(*arguments.command)
        sys.exit(subprocess.run(call, env=cluster.environment()).returncode)


if __name__ == "__main__":
    main()
