"""The preflight as a whole: on this machine, and in a job with a stand-in for srun.

tests/slurm/test_preflight.py has the same on a real cluster.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.errors import ConfigError
from launch.allocation import Allocation
from launch.preflight.findings import Report
from launch.preflight.run import count_trained, run_preflight
from tests.builders import run_record, write_run, write_shards
from tests.launches import ROOT
from tests.train.tiny import tiny_folder, tiny_model

pytestmark = pytest.mark.timeout(120)

# Starts every task here, its lines labelled, and does to some of them what the test wants.
SRUN = f"""#!{sys.executable}
import itertools, os, subprocess, sys, threading
options = list(itertools.takewhile(lambda a: a.startswith("-"), sys.argv[1:]))
value = {{o.partition("=")[0]: o.partition("=")[2] for o in options}}
nodes, tasks = value["--nodelist"].split(","), int(value["--ntasks"])
command = sys.argv[1 + len(options):]
def run(task):
    node = nodes[task * len(nodes) // tasks]
    env = dict(os.environ, SLURMD_NODENAME=node, RANK=str(task), LOCAL_RANK="0",
               WORLD_SIZE=str(tasks), OMP_NUM_THREADS="1")
    here = ["sleep", "60"] if set(SICK.get(node, ())) & set(command) else command
    process = subprocess.Popen(here, env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        print(f"{{task}}: {{line}}", end="", flush=True)
    process.wait()
threads = [threading.Thread(target=run, args=(task,)) for task in range(tasks)]
[t.start() for t in threads]
[t.join() for t in threads]
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("SLURM_JOB_ID", "LECTERN_PREFLIGHT_S"):
        monkeypatch.delenv(name, raising=False)
    shards = write_shards(tmp_path / "data", [6, 6])
    model = tiny_folder(tmp_path / "model")
    return write_run(tmp_path / "stage.yaml", run_record(tmp_path / "run", model, shards))


def use_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sick: dict[str, list[str]]
) -> Allocation:
    """Put the stand-in into PATH; `sick` is node -> modules that hang there."""
    path = tmp_path / "bin" / "srun"
    path.parent.mkdir()
    path.write_text(SRUN.replace("SICK.get", f"{sick!r}.get"))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")
    return Allocation("7", 0, ("localhost", "n2"), 0, 1, 1)


def command(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.preflight", str(config), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def states(report: Report) -> dict[str, str]:
    return {verdict.name: verdict.state for verdict in report.verdicts}


def test_by_hand_it_looks_at_this_machine(config: Path, tmp_path: Path) -> None:
    outcome = command(config)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert {line[0] for line in lines} <= {"ok", "warn"}
    assert {"disk", "folder", "model", "data", "device", "attention"} <= {line[2] for line in lines}
    assert list((tmp_path / "run" / "stage2").iterdir()) == []


def test_what_the_user_must_change_ends_with_2(config: Path, tmp_path: Path) -> None:
    outcome = command(config, "--json", f"model.path={tmp_path}/nowhere", "data.validation=[x.tar]")
    record = json.loads(outcome.stdout)
    assert outcome.returncode == record["exit_code"] == 2
    failed = {v["name"]: v["detail"] for v in record["verdicts"] if v["state"] == "FAIL"}
    assert set(failed) == {"model", "data"}
    assert "x.tar" in failed["data"] and "nowhere" in failed["model"]
    assert command(config, "optim.lr=fast").returncode == 2


def test_in_a_job_all_nodes_are_compared_and_the_ranks_meet(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = use_srun(tmp_path, monkeypatch, {})
    report = run_preflight(str(config), [], allocation, tmp_path / "out")
    assert report.exit_code == 0 and not report.bad_nodes, str(report)
    found = {(v.name, v.node): v.detail for v in report.verdicts}
    assert found["same", "all"].startswith("code, packages, python")
    assert found["world", "all"].startswith("2 ranks") and ("all-reduce", "all") in found
    written = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))


@pytest.mark.parametrize(
    ("modules", "reasons"),
    [
        (["launch.preflight.node_check"], ["no answer within"]),
        (["train.probe", "data_tools.check"], ["rank 1 did not arrive", "no answer in time"]),
    ],
)
def test_a_node_on_which_something_hangs_is_named_within_the_limit(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modules: list[str],
    reasons: list[str],
) -> None:
    allocation = use_srun(tmp_path, monkeypatch, {"n2": modules})
    before_s = time.monotonic()
    report = run_preflight(str(config), [], allocation, tmp_path / "out", limit_s=20)
    assert time.monotonic() - before_s < 28
    assert report.exit_code == 70 and list(report.bad_nodes) == ["n2"], str(report)
    assert all(reason in report.bad_nodes["n2"] for reason in reasons)


def test_more_ranks_than_packs_are_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = use_srun(tmp_path, monkeypatch, {})
    report = run_preflight(str(config), ["data.packs_per_step=1"], allocation, tmp_path / "out")
    assert report.exit_code == 2 and states(report)["world"] == "FAIL"
    assert states(report)["all-reduce"] == "ok"  # the rest is looked at all the same


def test_srun_that_fails_is_told_for_every_node(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = use_srun(tmp_path, monkeypatch, {})
    path = tmp_path / "bin" / "srun"
    path.write_text("#!/bin/sh\necho 'srun: error: Unable to create step' >&2; exit 1\n")
    report = run_preflight(str(config), [], allocation, tmp_path / "out")
    assert report.exit_code == 70 and set(report.bad_nodes) == {"localhost", "n2"}
    assert "Unable to create step" in report.bad_nodes["n2"]


@pytest.mark.parametrize("stage", [1, 2])
def test_trained_parameters_are_counted_from_the_files(tmp_path: Path, stage: int) -> None:
    folder = tiny_folder(tmp_path)
    names = dict(tiny_model().named_parameters())
    wanted = sum(p.numel() for name, p in names.items() if stage == 2 or "visual." in name)
    assert count_trained(folder, stage) == wanted > 0


def test_a_damaged_weight_file_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert count_trained(tmp_path, 2) == 0


@pytest.mark.parametrize("text", ["soon", "0", "-3"])
def test_a_limit_that_is_none_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("LECTERN_PREFLIGHT_S", text)
    with pytest.raises(ConfigError, match="LECTERN_PREFLIGHT_S"):
        run_preflight(str(config), [], None, tmp_path / "out")
