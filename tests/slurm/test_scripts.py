"""The job scripts without a cluster: what they refuse, and what they start."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launches import BIN, ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOB_SCRIPTS = ("stage1.sh", "stage2.sh", "convert.sh")


def bash(
    command: str, environment: dict[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    kept = {name: v for name, v in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env=kept | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    if not (BIN / "shellcheck").exists():
        pytest.skip("shellcheck is not installed (extra `dev`)")
    names = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    result = subprocess.run(
        [str(BIN / "shellcheck"), "-x", *names], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", JOB_SCRIPTS)
def test_a_script_submitted_from_elsewhere_says_so(name: str, tmp_path: Path) -> None:
    spooled = shutil.copy(ROOT / "slurm" / name, tmp_path / "slurm_script")
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1"}
    result = bash(f"bash {spooled}", job, cwd=tmp_path)
    assert result.returncode == 2
    assert "call sbatch in the clone" in result.stderr


@pytest.mark.parametrize("name", JOB_SCRIPTS)
def test_a_script_started_without_sbatch_says_so(name: str) -> None:
    result = bash(f"bash slurm/{name}")
    assert result.returncode == 2
    assert "submit it with sbatch" in result.stderr


def test_a_missing_environment_is_named(tmp_path: Path) -> None:
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1"}
    result = bash("bash slurm/stage1.sh", job | {"LECTERN_PYTHON": str(tmp_path / "python")})
    assert result.returncode == 2
    assert f"there is no {tmp_path}/python" in result.stderr
    assert "make setup" in result.stderr


@pytest.mark.parametrize("name", ["stage1.sh", "stage2.sh"])
def test_a_stage_says_which_configuration_it_takes(name: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$*"\n', encoding="utf-8")
    python.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "LECTERN_PYTHON": str(python)}
    result = bash(f"bash slurm/{name} my.yaml run.seed=1", job)
    default = f"configs/{name.removesuffix('.sh')}.yaml"
    assert result.stdout == f"-m launch.stage --default {default} my.yaml run.seed=1\n"


def test_nothing_needs_an_accounting_database() -> None:
    for path in [*SCRIPTS, *(ROOT / "launch").rglob("*.py")]:
        command = [
            line for line in path.read_text(encoding="utf-8").splitlines() if "sacct" in line
        ]
        assert all("`sacct`" in line for line in command), path
