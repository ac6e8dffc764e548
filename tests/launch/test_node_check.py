"""What a node says of itself: GPUs through a stand-in for nvidia-smi, full disks, stale locks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.preflight import node_check
from launch.preflight.node_check import (
    check_node,
    clear_locks,
    digest_code,
    find_gpus,
    find_space,
    try_folder,
)
from tests.launches import ROOT

H100 = "0, NVIDIA H100 80GB HBM3, 570.124.06, 81559, 4, 0"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program nvidia-smi, to be written; nothing else is in PATH but the shell's tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder / "nvidia-smi"


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_gpus_are_those_that_the_job_was_granted(smi: Path) -> None:
    second = H100.replace("0, NV", "1, NV", 1).replace(", 4, 0", ", 70000, 3")
    write_program(smi, f'echo "{H100}"; echo "{second}"; test "$1" != "" ')
    everything = find_gpus({})
    assert everything["error"] == "" and len(everything["list"]) == 2
    (gpu,) = find_gpus({"CUDA_VISIBLE_DEVICES": "1"})["list"]
    assert gpu == {
        "index": "1", "name": "NVIDIA H100 80GB HBM3", "driver": "570.124.06",
        "memory_mib": 81559, "used_mib": 70000, "ecc_errors": 3,
    }  # fmt: skip


def test_a_card_that_counts_no_memory_errors_is_fine(smi: Path) -> None:
    write_program(smi, 'echo "0, NVIDIA L4, 570.1, 23034, 1, [N/A]"')
    assert find_gpus({})["list"][0]["ecc_errors"] is None


def test_nvidia_smi_that_fails_or_hangs_is_told(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(smi, 'echo "No devices were found"; exit 6')
    assert find_gpus({}) == {"list": [], "error": "nvidia-smi: No devices were found"}
    monkeypatch.setattr(node_check, "NVIDIA_SMI_TIMEOUT_S", 0.3)
    write_program(smi, "exec sleep 20")
    assert "gives no answer in 0.3 s" in find_gpus({})["error"]


def test_without_nvidia_smi_there_is_no_gpu_and_no_error(smi: Path) -> None:
    assert find_gpus({}) == {"list": [], "error": ""}


def test_free_space_is_that_of_the_nearest_folder_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def statvfs(path: Path) -> SimpleNamespace:
        asked.append(Path(path))
        return SimpleNamespace(f_bavail=3, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert find_space(tmp_path / "run" / "stage1")["run"] == 3 * 4096
    assert tmp_path in asked


def test_a_folder_that_takes_files_keeps_none_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "stage1"
    assert try_folder(folder) == {"error": "", "is_shared": True}
    assert list(folder.iterdir()) == []
    assert not try_folder(folder, ".preflight-1")["is_shared"]
    (folder / ".preflight-1").touch()
    assert try_folder(folder, ".preflight-1")["is_shared"]


def test_a_folder_that_takes_no_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = try_folder(tmp_path / "file" / "stage1")["error"]
    assert "Not a directory" in error or "File exists" in error


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "py311_cu128" / "fused_adam" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def make_old(path: Path) -> None:
    before = time.time() - 2 * node_check.LOCK_AGE_S
    os.utime(path, (before, before))


def test_an_old_lock_without_an_owner_is_removed(tmp_path: Path, lock: Path) -> None:
    make_old(lock)
    (found,) = clear_locks(tmp_path, time.time())
    assert found["done"] == "removed" and found["path"] == str(lock) and not lock.exists()
    assert clear_locks(tmp_path, time.time()) == []


def test_a_young_lock_stays(tmp_path: Path, lock: Path) -> None:
    assert clear_locks(tmp_path, time.time())[0]["done"] == "young" and lock.exists()


def test_a_lock_that_a_living_process_holds_stays_however_old(tmp_path: Path, lock: Path) -> None:
    make_old(lock)
    with open(lock):
        assert clear_locks(tmp_path, time.time())[0]["done"] == "held"
    assert lock.exists()


def test_the_digest_sees_every_module(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    module = tmp_path / "train" / "loop.py"
    module.write_text("a = 1\n")
    first = digest_code(tmp_path)
    assert digest_code(tmp_path) == first
    module.write_text("a = 2\n")
    assert digest_code(tmp_path) != first


def test_a_model_is_read_and_measured(tmp_path: Path) -> None:
    assert "FileNotFoundError" in check_node(None, tmp_path)["model"]["error"]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(bytes(100))
    assert check_node(None, tmp_path)["model"] == {"files": 1, "bytes": 100, "error": ""}


@pytest.mark.timeout(60)
def test_the_command_is_quick_and_loads_no_tensors(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.preflight.node_check import main; sys.argv[1:] = "
        f"['--folder', {str(tmp_path / 'run')!r}]; main(); assert 'torch' not in sys.modules"
    )
    before_s = time.monotonic()
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert outcome.returncode == 0, outcome.stderr
    about = json.loads(outcome.stdout)
    assert about["packages"]["numpy"] and about["code"]["digest"] and about["cores"] >= 1
    assert time.monotonic() - before_s < 5  # a second on a machine that is not shared
