"""Where the daemons of a test cluster run: all on this machine, or each in namespaces of its own.

`Loopback` needs no more than root. `Namespaces` gives each node its own network, host name,
processes and /dev/shm, names that resolve, a cable to pull, and no way out to the internet.
"""

import shutil
import subprocess
from pathlib import Path

import psutil

from tests.slurm.settings import Address, loopback_addresses

NETWORK = "10.213.0"
CONTROLLER = "ctl"
KINDS = ("--net", "--uts", "--mount")  # of the controller, where one logs in
NODE_KINDS = (*KINDS, "--ipc", "--pid")

# The first process of a machine: prepares it, then collects what is left behind by others.
INIT = """
set -e
mount --bind "$2" /etc/hosts
if [ "$1" != ctl ]; then mount -t proc proc /proc; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; fi
hostname "$1"
ip link set lo up
echo ready
exec >/dev/null 2>&1
while :; do sleep 1; done
"""


class Loopback:
    """All nodes share this machine: its network, its host name, its processes."""

    def __init__(self, nodes: list[str]) -> None:
        self.addresses = loopback_addresses(nodes)

    def enter(self, name: str) -> list[str]:
        """Return what to put in front of a command that shall run on a machine."""
        return []

    def power_on(self, name: str) -> None:
        """Nothing to do: the machine is ours."""

    def power_off(self, name: str) -> None:
        """Nothing to do: the node's processes are ended by the cluster."""

    def connect(self, name: str, is_connected: bool) -> None:
        raise RuntimeError("there is no cable to pull: use mode netns")


class Namespaces:
    """A machine a node and one for the controller, on a bridge; `folder` takes the hosts file."""

    def __init__(self, nodes: list[str], folder: Path) -> None:
        self.addresses = {CONTROLLER: Address(CONTROLLER, f"{NETWORK}.1", 6817)} | {
            name: Address(name, f"{NETWORK}.{10 + number}", 6818)
            for number, name in enumerate(nodes, start=1)
        }
        self._hosts = folder / "hosts"
        self._init: dict[str, psutil.Popen] = {}

    def enter(self, name: str) -> list[str]:
        """Return what to put in front of a command that shall run on a machine.

        Raises:
            RuntimeError: if the machine is switched off.
        """
        if name not in self._init:
            raise RuntimeError(f"{name} is switched off")
        kinds = KINDS if name == CONTROLLER else NODE_KINDS
        # --wd: entering a mount namespace would otherwise lead to /
        return ["nsenter", f"--target={self._pid(name)}", *kinds, "--wd=.", "--"]

    def power_on(self, name: str) -> None:
        if name in self._init:
            return
        known = {"localhost": "127.0.0.1"} | {n: at.address for n, at in self.addresses.items()}
        lines = [f"{address} {host}\n" for host, address in known.items()]
        self._hosts.write_text("".join(lines), encoding="utf-8")
        kinds = KINDS if name == CONTROLLER else (*NODE_KINDS, "--fork", "--kill-child")
        init = psutil.Popen(
            ["unshare", *kinds, "bash", "-c", INIT, "init", name, str(self._hosts)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if init.stdout.readline().strip() != "ready":
            raise RuntimeError(f"no namespaces for {name}: {init.communicate()[1].strip()}")
        self._init[name] = init
        self._wire(name)

    def power_off(self, name: str) -> None:
        """End a machine with all its processes; the others see silence, as of a dead one."""
        if name not in self._init:
            return
        if name != CONTROLLER:
            # First the cable. The kernel would also keep it for a while after the machine's end.
            self._ip(CONTROLLER, "link", "delete", f"to-{name}")
            psutil.Process(self._pid(name)).kill()
        init = self._init.pop(name)
        init.kill()
        init.communicate()

    def connect(self, name: str, is_connected: bool) -> None:
        self._ip(CONTROLLER, "link", "set", f"to-{name}", "up" if is_connected else "down")

    def _pid(self, name: str) -> int:
        """Return the number of a machine's first process; a node's is the child of unshare."""
        init = self._init[name]
        return init.pid if name == CONTROLLER else init.children()[0].pid

    def _wire(self, name: str) -> None:
        address = f"{self.addresses[name].address}/24"
        if name == CONTROLLER:
            self._ip(name, "link", "add", "bridge", "type", "bridge")
            device = "bridge"
        else:
            ends = (f"to-{name}", "type", "veth", "peer", "name", "eth0")
            self._ip(CONTROLLER, "link", "add", *ends, "netns", str(self._pid(name)))
            self._ip(CONTROLLER, "link", "set", f"to-{name}", "master", "bridge", "up")
            device = "eth0"
        self._ip(name, "address", "add", address, "dev", device)
        self._ip(name, "link", "set", device, "up")

    def _ip(self, name: str, *arguments: str) -> None:
        enter = ["nsenter", f"--target={self._pid(name)}", "--net", "--"]
        subprocess.run([*enter, "ip", *arguments], check=True, capture_output=True, timeout=20)


def namespaces_missing() -> str:
    """Return why `Namespaces` cannot be used here, or ""."""
    for program, package in (
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("ip", "iproute2"),
    ):
        if shutil.which(program) is None:
            return f"there is no {program} (Debian package {package})"
    command = ["unshare", *NODE_KINDS, "--fork", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    trial = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return f"namespaces are not permitted: {trial.stderr.strip()}" if trial.returncode else ""
