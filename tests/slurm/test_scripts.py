"""The job scripts without a cluster: lib.sh with a stubbed Slurm, and what they say."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launches import BIN, ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOB_SCRIPTS = ("stage1.sh", "stage2.sh", "convert.sh")
BASE = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
SCONTROL = """#!/bin/sh
case "$*" in
  "show hostnames node[7-8]") printf '%s\\n' node7 node8 ;;
  "show hostnames localhost") echo localhost ;;
  "-o show node node7") echo "NodeName=node7 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=node7" ;;
  *) exit 1 ;;
esac
"""
SRUN = """#!/bin/bash
echo "srun $*" >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=1 "$@" &  # every task runs; srun returns the highest code
first=$!
SLURM_PROCID=0 "$@"; codes=($?)
wait "$first"; codes+=($?)
printf '%s\\n' "${codes[@]}" | sort -n | tail -n 1 | { read -r code; exit "$code"; }
"""


def stub(folder: Path, **programs: str) -> str:
    """Write programs and return a PATH on which they come first."""
    for name, text in programs.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


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


def call(function: str, **environment: str) -> str:
    result = bash(f"source slurm/lib.sh; {function}", BASE | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


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


def test_the_head_is_the_first_node_where_its_name_resolves(tmp_path: Path) -> None:
    path = stub(tmp_path, scontrol=SCONTROL)
    assert call("head_address", PATH=path, SLURM_JOB_NODELIST="localhost") == "localhost"


def test_the_head_is_its_node_address_where_names_do_not_resolve(tmp_path: Path) -> None:
    path = stub(tmp_path, scontrol=SCONTROL, getent="#!/bin/sh\nexit 2\n")
    assert call("head_address", PATH=path) == "10.1.2.3"


def test_the_port_differs_between_jobs_and_between_starts_of_a_job() -> None:
    ports = [
        call("rendezvous_port", SLURM_JOB_ID=job, SLURM_RESTART_COUNT=count)
        for job, count in (("12345", "0"), ("12346", "0"), ("12345", "1"))
    ]
    assert call("rendezvous_port") == ports[0] == "22345"
    assert len(set(ports)) == 3
    assert call("rendezvous_port", SLURM_JOB_ID="99999") == "29999", "below the ephemeral ports"


@pytest.mark.parametrize(
    ("granted", "expected"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "16"),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "2"}, "8"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:4"}, "8"),
        ({"SLURM_NTASKS": "6"}, "6"),
        ({}, "2"),
    ],
)
def test_one_rank_a_gpu_else_a_task_else_a_node(granted: dict, expected: str) -> None:
    assert call('count_ranks "$(count_gpus)"', **granted) == expected


@pytest.mark.parametrize(
    ("granted", "expected"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2)"}, "8"),
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x3),48"}, "6"),
        ({"SLURM_JOB_CPUS_PER_NODE": "4(x2)"}, "1"),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2)", "SLURM_CPUS_PER_TASK": "3"}, "3"),
    ],
)
def test_cpus_of_a_rank_are_its_share_of_the_smallest_node(granted: dict, expected: str) -> None:
    assert call("count_cpus 8", **granted) == expected


def run_ranks(tmp_path: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command through lib.sh's run_ranks in a folder with logs/, srun and scancel stubbed."""
    (tmp_path / "logs").mkdir(exist_ok=True)
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    path = stub(tools, scontrol=SCONTROL, getent="#!/bin/sh\nexit 2\n", srun=SRUN)
    settings = BASE | {"SLURM_NTASKS": "2", "SLURM_JOB_CPUS_PER_NODE": "8(x2)", "PATH": path}
    calls = {"CALLS": str(tmp_path / "calls")}
    return bash(
        f"source {ROOT}/slurm/lib.sh; run_ranks {command}",
        settings | calls | environment,
        cwd=tmp_path,
    )


def test_the_code_of_the_first_rank_that_failed_is_passed_on(tmp_path: Path) -> None:
    command = "bash -c 'sleep 0.$((SLURM_PROCID * 5)); exit $((2 + 141 * SLURM_PROCID))'"
    result = run_ranks(tmp_path, command)
    assert result.returncode == 2, result.stderr
    assert run_ranks(tmp_path, "true").returncode == 0
    assert not list((tmp_path / "logs").iterdir()), "the codes are cleared away"


def test_ranks_get_their_rendezvous_and_the_log_says_what_was_resolved(tmp_path: Path) -> None:
    result = run_ranks(tmp_path, "bash -c 'echo meet at $MASTER_ADDR:$MASTER_PORT'")
    assert result.stdout.count("meet at 10.1.2.3:22345") == 2
    assert "2 ranks on 2 nodes (node[7-8])" in result.stdout
    call_of_srun = (tmp_path / "calls").read_text(encoding="utf-8")
    for option in ("--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--wait=60"):
        assert option in call_of_srun
    assert "--kill-on-bad-exit=1" in call_of_srun
    assert "--gpus" not in call_of_srun


def test_every_rank_sees_all_gpus_of_its_node(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, "true", SLURM_GPUS_ON_NODE="4").returncode == 0
    assert "--ntasks=8 --ntasks-per-node=4 --cpus-per-task=2 --gpus-per-node=4" in (
        tmp_path / "calls"
    ).read_text(encoding="utf-8")
    result = run_ranks(tmp_path, "true", SLURM_GPUS_ON_NODE="4", SLURM_GPUS_PER_TASK="1")
    assert result.returncode == 2
    assert "ask for --gpus-per-node" in result.stderr


def test_usr1_reaches_the_ranks_and_their_exit_code_is_kept(tmp_path: Path) -> None:
    trainer = tmp_path / "trainer.sh"
    loop = (
        'trap "sleep 0.3; exit 75" USR1; echo $$ >"up-$SLURM_PROCID"; while :; do sleep 0.05; done'
    )
    trainer.write_text(loop, encoding="utf-8")
    (tmp_path / "tools").mkdir()
    scancel = '#!/bin/sh\necho "$*" >scancelled\nkill -USR1 $(cat up-0 up-1)\n'
    stub(tmp_path / "tools", scancel=scancel)
    command = (
        f"bash {trainer} & job=$!; until [ -s up-0 ] && [ -s up-1 ]; do sleep 0.05; done; "
        'kill -USR1 "$job"; until [ -s scancelled ]; do sleep 0.05; done; '
        'kill -TERM "$job"; wait "$job"'
    )
    result = run_ranks(tmp_path, command)
    assert result.returncode == 75, result.stderr
    assert (tmp_path / "scancelled").read_text().split() == ["--signal=USR1", "12345"]


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


def test_the_configuration_is_the_first_argument_or_the_default() -> None:
    def trained(*arguments: str) -> str:
        words = " ".join(arguments)
        stubbed = 'run_ranks() { echo "${*:2}"; }; python=python'
        return call(f"{stubbed}; train_stage configs/stage1.yaml {words}")

    default = "train/main.py --config configs/stage1.yaml"
    assert trained() == default
    assert trained("optim.lr=1e-5") == f"{default} optim.lr=1e-5"
    assert trained("--dry-run") == f"{default} --dry-run"
    own = "train/main.py --config my/stage1.yaml run.seed=1"
    assert trained("my/stage1.yaml", "run.seed=1") == own
