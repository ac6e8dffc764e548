"""Look at the node this runs on, before ranks are started there: JSON out, no tensors, no verdict.

    python -m launch.preflight.node_check
    srun --ntasks-per-node=1 python -m launch.preflight.node_check --folder runs/invoices/stage1

It reports GPUs (as nvidia-smi tells), free space, whether the run folder takes and keeps a file,
the clock, the cores, what code and packages would run, and the model's files. Locks that a killed
build of a torch extension left behind, at which every later job would wait for ever, are removed.
`launch.preflight` starts it on every node and compares the answers.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.errors import run_command

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_tools", "train", "inference", "launch")
NVIDIA_SMI_TIMEOUT_S = 15  # it hangs on a GPU that has fallen off the bus
GPU_FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used",
              "ecc.errors.uncorrected.volatile.total")  # fmt: skip
LOCK_AGE_S = 15 * 60  # no extension builds for so long
MAX_LOCK_DEPTH = 4  # ROOT/py311_cu128/NAME/lock
# Where these differ between nodes, ranks wait for each other or take different roads.
SHARED_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "FI_", "MASTER_ADDR", "MASTER_PORT")


def check_node(folder: Path | None, model: Path | None, token: str = "") -> dict[str, Any]:
    """Return what there is to know of this node.

    Args:
        folder: of the stage, RUN/stageN; None leaves it out.
        model: Hugging Face folder; None leaves it out.
        token: name of a file that must be seen in the run folder; "" for none.
    """
    return {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0],
        "time_s": time.time(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "gpus": find_gpus(os.environ),
        "space": find_space(folder),
        "folder": try_folder(folder, token) if folder else None,
        "model": look_at_model(model) if model else None,
        "code": {"revision": git_revision(ROOT), "digest": digest_code(ROOT)},
        "packages": installed_packages(),
        "locks": clear_locks(extensions_folder(os.environ), time.time()),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(SHARED_VARIABLES)
        },
    }


def find_gpus(env: Mapping[str, str]) -> dict[str, Any]:
    """Return this step's GPUs as nvidia-smi knows them, or why it does not.

    Returns:
        "list" of dictionaries: index, name, driver, memory_mib and used_mib, ecc_errors (None where
        the card counts none); "error": "" or what went wrong. Without the program: no GPU, no
        error.
    """
    if shutil.which("nvidia-smi") is None:
        return {"list": [], "error": ""}
    query = [f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(
            ["nvidia-smi", *query],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"list": [], "error": f"nvidia-smi gives no answer in {NVIDIA_SMI_TIMEOUT_S} s"}
    if result.returncode != 0:
        said = (result.stderr.strip() or result.stdout.strip()).splitlines()
        return {"list": [], "error": f"nvidia-smi: {said[0] if said else result.returncode}"}
    granted = env.get("CUDA_VISIBLE_DEVICES", "")
    # Without cgroups nvidia-smi shows the other jobs' GPUs as well.
    mine = granted.split(",") if granted.replace(",", "").isdecimal() else None
    rows = [_read_gpu(line) for line in result.stdout.splitlines() if line.strip()]
    return {"list": [gpu for gpu in rows if mine is None or gpu["index"] in mine], "error": ""}


def _read_gpu(line: str) -> dict[str, Any]:
    index, name, driver, total, used, ecc = (part.strip() for part in line.split(","))
    return {
        "index": index,
        "name": name,
        "driver": driver,
        "memory_mib": int(total) if total.isdecimal() else None,
        "used_mib": int(used) if used.isdecimal() else None,
        "ecc_errors": int(ecc) if ecc.isdecimal() else None,
    }


def find_space(folder: Path | None) -> dict[str, int]:
    """Return the free bytes, for this user, of the run folder, the temporary one and /dev/shm."""
    places = {"tmp": Path(tempfile.gettempdir()), "shm": Path("/dev/shm")}
    if folder is not None:
        folder = folder.absolute()
        places["run"] = next(path for path in (folder, *folder.parents) if path.exists())
    free = {}
    for name, path in places.items():
        with suppress(OSError):  # no /dev/shm: not there is not full
            about = os.statvfs(path)
            free[name] = about.f_bavail * about.f_frsize
    return free


def try_folder(folder: Path, token: str = "") -> dict[str, Any]:
    """Write, rename and read a file in the run folder, and look for one that another node wrote.

    Returns:
        "error": "" or what failed; "is_shared": whether the file `token` is there.
    """
    name = f".try-{socket.gethostname()}-{os.getpid()}"
    first, second = folder / f"{name}.tmp", folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        first.write_text(name, encoding="utf-8")
        os.replace(first, second)
        is_same = second.read_text(encoding="utf-8") == name
        second.unlink()
    except OSError as error:
        with suppress(OSError):
            first.unlink()
        return {"error": f"{error.strerror}: {error.filename}", "is_shared": False}
    is_shared = (folder / token).exists()
    return {
        "error": "" if is_same else "a file read back is not what was written",
        "is_shared": is_shared,
    }


def look_at_model(folder: Path) -> dict[str, Any]:
    """Return number and bytes of a model's weight files, the first bytes of each read."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = sorted(folder.glob("*.safetensors"))
        for path in files:
            with open(path, "rb") as stream:
                stream.read(8)
        return {"files": len(files), "bytes": sum(p.stat().st_size for p in files), "error": ""}
    except (OSError, ValueError) as error:
        return {"files": 0, "bytes": 0, "error": f"{type(error).__name__}: {error}"}


def git_revision(root: Path) -> str:
    """Return the commit of the clone; "" where it is none or git is missing."""
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()


def digest_code(root: Path) -> str:
    """Return a digest of the names and bytes of all our modules."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def installed_packages() -> dict[str, str]:
    """Return the version of every installed package."""
    found = importlib.metadata.distributions()
    return {d.metadata["Name"]: d.version for d in found if d.metadata["Name"]}


def extensions_folder(env: Mapping[str, str]) -> Path:
    """Return where torch builds its extensions."""
    return Path(
        env.get("TORCH_EXTENSIONS_DIR")
        or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    )


def clear_locks(folder: Path, now_s: float) -> list[dict[str, Any]]:
    """Remove the locks that nobody holds any more; return what was found.

    Args:
        folder: of torch's extensions.
        now_s: the time, in seconds since 1970.

    Returns:
        Per lock: path, age_s, and what was done: "removed", "held" (a process of this node has it
        open, as torch's builder does), or "young": its owner may be on another node.
    """
    found = []
    for path in _locks(folder):
        try:
            age_s = now_s - path.stat().st_mtime
            if _is_open(path):
                done = "held"
            elif age_s < LOCK_AGE_S:
                done = "young"
            else:
                path.unlink()
                done = "removed"
        except FileNotFoundError:
            continue  # its owner, or another node's check, has just removed it
        found.append({"path": str(path), "age_s": round(age_s), "done": done})
    return found


def _locks(folder: Path) -> Iterator[Path]:
    for depth in range(1, MAX_LOCK_DEPTH):
        yield from folder.glob("*/" * depth + "lock")


def _is_open(path: Path) -> bool:
    """Tell whether a process of this node that we may look at has a file open."""
    wanted = path.stat()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it has ended, or is another user's
            about = link.stat()
            if (about.st_dev, about.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.preflight.node_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, help="of the stage, RUN/stageN")
    parser.add_argument("--model", type=Path, help="Hugging Face folder")
    parser.add_argument("--token", default="", help="name of a file that the run folder must show")
    return parser.parse_args(arguments)


def main() -> int:
    """Print what there is to know of this node."""
    options = parse_arguments()
    json.dump(check_node(options.folder, options.model, options.token), sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    run_command(main)
