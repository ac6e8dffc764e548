"""`sbatch slurm/stage1.sh` as a user types it: two nodes, preflight included, then the export."""

import re
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.slurm.cluster import Cluster
from tests.slurm.runs import ENVIRONMENT, TWO_NODES, submit_stage, tiny_run
from train.checkpoint.manifest import find_checkpoint, read_manifest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_a_stage_trains_on_two_nodes_and_is_converted(cluster: Cluster, tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    job = submit_stage(cluster, config, "run.seed=3", LECTERN_PREFLIGHT="")
    assert job.wait(200) == ("COMPLETED", "0:0"), job.log
    assert re.search(r"2 ranks on 2 nodes .* rendezvous at 127\.0\.0\.1:2\d{4}\b", job.log), job.log
    assert job.log.index("all-reduce") < job.log.index("+ srun"), "preflight, then train"
    stage = tmp_path / "run" / "stage1"
    manifest = read_manifest(find_checkpoint(stage / "checkpoints", None))
    assert (manifest.step, manifest.world_size) == (3, 2)
    assert "seed: 3" in (stage / "config.yaml").read_text(encoding="utf-8")

    command = ("slurm/convert.sh", str(stage), "--dtype", "fp32")
    convert = cluster.submit((), *command, env=ENVIRONMENT)
    assert convert.wait() == ("COMPLETED", "0:0"), convert.log
    with safe_open(stage / "hf" / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
    assert any(name.startswith("visual.") for name in names)
    assert (stage / "hf" / "lectern.json").exists()


@pytest.mark.slow
def test_nodes_with_networks_of_their_own_meet_by_name(
    netns_cluster: Cluster, tmp_path: Path
) -> None:
    job = submit_stage(netns_cluster, tiny_run(tmp_path), options=TWO_NODES, LECTERN_PREFLIGHT="")
    assert job.wait(200) == ("COMPLETED", "0:0"), job.log
    assert "rendezvous at n1:2" in job.log
