"""Where the ranks of a Slurm job meet: the first node's address, and a port of the job's own.

Imports no torch.
"""

import re
import socket
import subprocess
from collections.abc import Mapping

from data_tools.errors import LaunchError

FIRST_PORT, NUM_PORTS = 20000, 10000  # below the ports that kernels give out by themselves (32768)
PORTS_A_START = 1000
_SCONTROL_TIMEOUT_S = 60


def first_host(nodelist: str) -> str:
    """Return the first node of Slurm's list: `n007` of `n[007-010,12]` or of `n007,x1`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        raise LaunchError(f"{nodelist!r} is no list of nodes as Slurm writes it, like n[1-4]")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def head_address(node: str) -> str:
    """Return how a node is reached: by name where names resolve, else by Slurm's NodeAddr.

    Raises:
        LaunchError: if neither is known here.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        address = _node_address(node)
    if not address:
        raise LaunchError(
            f"the name of node {node} does not resolve here, and scontrol knows no NodeAddr of it; "
            "export MASTER_ADDR in slurm/site.sh"
        )
    return address


def rendezvous_port(job_id: str, restart: int) -> int:
    """Return a port that neither another job nor an earlier start of this one is likely to use."""
    number = int(job_id) + PORTS_A_START * restart
    return FIRST_PORT + number % NUM_PORTS


def find_rendezvous(env: Mapping[str, str]) -> tuple[str, int]:
    """Return address and port of a step's first rank from SLURM_*.

    Raises:
        LaunchError: if the list of nodes is missing or the first one cannot be reached by name.
    """
    nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    restart = int(env.get("SLURM_RESTART_COUNT") or 0)
    port = rendezvous_port(env.get("SLURM_JOB_ID", "0"), restart)
    return head_address(first_host(nodelist)), port


def _node_address(node: str) -> str:
    command = ["scontrol", "-o", "show", "node", node]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_SCONTROL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\bNodeAddr=(\S+)", result.stdout)
    return found.group(1) if found else ""
