"""The preflight in a real job: every node answers, ranks meet, and what is sick is named."""

import json
from pathlib import Path

import pytest

from tests.builders import run_record, write_run, write_shards
from tests.launches import BIN
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job
from tests.train.tiny import tiny_folder

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

SCRIPT = f'#!/bin/bash\nexec "{BIN}/python" -m launch.preflight --json "$@"\n'
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
# Python reads a module of this name at its start: here a node, or a rank, goes wrong.
SICK = """
import os, sys, time
if os.environ.get("SLURMD_NODENAME") == "n2" and {module!r} in sys.orig_argv:
    {what}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "data", [6, 6])
    model = tiny_folder(tmp_path / "model")
    return write_run(tmp_path / "stage.yaml", run_record(tmp_path / "run", model, shards))


def run(cluster: Cluster, config: Path, sick: tuple[str, str] | None = None) -> Job:
    env = {"LECTERN_PREFLIGHT_S": "40", "OMP_NUM_THREADS": "1"}
    if sick is not None:
        folder = config.parent / "sick"
        folder.mkdir()
        module, what = sick
        (folder / "sitecustomize.py").write_text(SICK.format(module=module, what=what))
        env["PYTHONPATH"] = str(folder)
    return cluster.submit(TWO_NODES, SCRIPT, str(config), env=env)


def verdicts(job: Job) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (name, node) -> (state, detail) of an ended job's report."""
    record = json.loads(job.log[job.log.index("{") :])
    return {(v["name"], v["node"]): (v["state"], v["detail"]) for v in record["verdicts"]}


def bad_nodes(job: Job) -> dict[str, str]:
    return json.loads(job.log[job.log.index("{") :])["bad_nodes"]


def test_two_nodes_that_are_well(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = run(cluster, config)
    assert job.wait() == ("COMPLETED", "0:0"), job.log
    found = verdicts(job)
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert found["same", "all"][1].startswith("code, packages, python")
    assert found["world", "all"][1] == "2 ranks, 4 packs a step"
    assert found["all-reduce", "all"][1].startswith("2 ranks")
    assert {("clock", "all"), ("folder", "all"), ("data", "all"), ("device", "all")} <= set(found)
    stage = tmp_path / "run" / "stage2"
    assert [path.name for path in stage.iterdir()] == ["starts"]  # no token, no trial file


def test_a_node_that_gives_no_answer_is_named_and_the_others_are_probed(
    cluster: Cluster, config: Path
) -> None:
    job = run(cluster, config, ("launch.preflight.node_check", "time.sleep(600)"))
    assert job.wait() == ("FAILED", "70:0"), job.log
    found = verdicts(job)
    assert found["answer", "n2"][0] == "FAIL" and "no answer within" in found["answer", "n2"][1]
    assert list(bad_nodes(job)) == ["n2"]
    assert found["world", "all"][1] == "1 ranks, 4 packs a step"
    assert found["device", "n1"][0] == "ok"


def test_a_rank_that_never_arrives_is_named_with_its_node(cluster: Cluster, config: Path) -> None:
    job = run(cluster, config, ("train.probe", "time.sleep(600)"))
    assert job.wait() == ("FAILED", "70:0"), job.log
    assert "rank 1 did not arrive" in bad_nodes(job)["n2"]
    assert list(bad_nodes(job)) == ["n2"]


def test_a_skewed_clock_and_other_packages_are_found_from_the_other_node(
    cluster: Cluster, config: Path
) -> None:
    change = (
        "t = time.time; time.time = lambda: t() + 100; import importlib.metadata as m; "
        "d = m.distributions; m.distributions = lambda: list(d())[1:]"
    )
    job = run(cluster, config, ("launch.preflight.node_check", change))
    assert job.wait() == ("FAILED", "2:0"), job.log  # the packages are the user's
    found = verdicts(job)
    assert found["clock", "n2"][0] == "FAIL" and "s ahead" in found["clock", "n2"][1]
    assert found["packages", "n2"][0] == "FAIL" and "missing" in found["packages", "n2"][1]
    assert "packages" not in bad_nodes(job)["n2"] and "clock" in bad_nodes(job)["n2"]
