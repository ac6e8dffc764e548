"""What goes wrong besides the cluster: hangs, failures again and again, one run started twice."""

import re
import signal
from pathlib import Path

import pytest

from launch.starts import read_starts
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ENVIRONMENT, FOREVER, TWO_NODES, submit_stage, tiny_run
from train.checkpoint.manifest import find_checkpoint, read_manifest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_a_stopped_rank_is_named_the_stacks_are_shown_and_the_job_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    watchdog = {"heartbeat_s": 0.2, "min_s": 3.0}
    config = tiny_run(tmp_path, stage=FOREVER, monitor={"log_every": 1, "watchdog": watchdog})
    job = submit_stage(cluster, config, "checkpoint.every_steps=5")
    job.wait_for("step 10/")
    job.signal_rank(1, signal.SIGSTOP)
    job.wait_for("requeue: hang")
    assert re.search(r"hang: rank 1 on \S+ \(process \d+\), step \d+, [a-z ]+ for \d+ s", job.log)
    assert "its heartbeat stopped first" in job.log
    stacks = job.log.split("--- rank ")
    assert "train/loop.py" in stacks[1], "rank 0 shows where it waits"
    assert "no stacks: the process does not answer" in stacks[2]
    job.wait_for("resumed at step")
    (tmp_path / "run/stage1/STOP").touch()
    assert job.wait() == ("FAILED", "75:0"), job.log
    assert [start.action for start in read_starts(tmp_path / "run/stage1")] == ["requeue", "stop"]


@pytest.mark.slow
def test_failures_without_a_newer_checkpoint_stop_at_the_cap_with_the_reason(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path, stage=FOREVER)
    job = submit_stage(cluster, config, LECTERN_MAX_FAILURES="2")
    for start in (1, 2):
        job.wait_for(f"start {start}: ")
        job.wait_for("step 1/" if start == 1 else "start 2: ")
        job.signal_rank(1, signal.SIGKILL)
    assert job.wait() == ("FAILED", "137:0"), job.log
    assert "1 more starts without a newer checkpoint are allowed" in job.log
    assert "2 starts failed without a newer checkpoint: given up" in job.log
    starts = read_starts(tmp_path / "run/stage1")
    assert [start.action for start in starts] == ["requeue", "stop"]
    assert all("a rank was killed" in start.reason for start in starts)


def test_what_a_user_must_change_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    job = submit_stage(cluster, config, "optim.lr_vison=1e-5")
    assert job.wait() == ("FAILED", "2:0"), job.log
    assert "optim.lr_vison is not a known key" in job.log
    assert "Traceback" not in job.log
    late = submit_stage(cluster, config, "data.packs_per_step=1")  # only the ranks can know
    assert late.wait() == ("FAILED", "2:0"), late.log
    assert "stop: something to change" in late.log
    assert late.restarts == 0


@pytest.mark.slow
def test_a_run_is_trained_by_one_job_at_a_time(cluster: Cluster, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, stage=FOREVER)
    alone = ("--nodes=1", "--ntasks-per-node=1")
    first = submit_stage(cluster, config, options=alone)
    first.wait_for("step 1/")
    second = submit_stage(cluster, config, options=alone)
    assert second.wait() == ("FAILED", "2:0"), second.log
    assert f"is being trained by job {first.number} already (RUNNING)" in second.log
    (tmp_path / "run/stage1/STOP").touch()
    assert first.wait() == ("FAILED", "75:0"), first.log
    saved = read_manifest(find_checkpoint(tmp_path / "run/stage1/checkpoints", None)).step
    third = submit_stage(cluster, config, f"stage.max_steps={saved + 1}", options=alone)
    assert third.wait() == ("COMPLETED", "0:0"), third.log
    again = submit_stage(cluster, config, options=alone)
    assert again.wait() == ("COMPLETED", "0:0"), again.log
    assert "is done already" in again.log


@pytest.mark.slow
def test_fake_gpus_give_one_rank_each_and_every_rank_sees_all_of_its_node(
    gpu_cluster: Cluster, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path)
    told = tmp_path / "told"
    python = tmp_path / "python"  # stands in for the trainer: there is nothing behind these GPUs
    python.write_text(
        "#!/bin/bash\n"
        f'case "$1" in *main.py) echo "$SLURM_PROCID $SLURM_LOCALID $SLURM_NTASKS '
        f'$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" >>{told}; exit 2 ;; esac\n'
        f'exec {ENVIRONMENT["LECTERN_PYTHON"]} "$@"\n',
        encoding="utf-8",
    )
    python.chmod(0o755)
    job = submit_stage(
        gpu_cluster,
        config,
        options=("--nodes=2", "--gpus-per-node=2"),
        LECTERN_PYTHON=str(python),
    )
    assert job.wait()[0] == "FAILED"
    assert "4 ranks on 2 nodes (n1,n2), 2 GPUs a node" in job.log
    ranks = sorted(told.read_text().splitlines())
    assert ranks == [f"{r} {r % 2} 4 n{1 + r // 2} 0,1" for r in range(4)]


HEAD = """
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
getent hosts "$head" >/dev/null ||
  head=$(scontrol -o show node "$head" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export head port=$((20000 + SLURM_JOB_ID % 10000))
"""
LAUNCHERS = {
    "srun": "srun {python} train/main.py --config {config}",
    "torchrun": HEAD
    + """srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec {python} -m torch.distributed.run \\
  --nnodes "$SLURM_NNODES" --nproc-per-node 1 --node-rank "$SLURM_NODEID" --rdzv-backend static \\
  --master-addr "$head" --master-port "$port" train/main.py --config {config}'""",
    "deepspeed": HEAD
    + """scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots=1/' >{folder}/hosts
srun --kill-on-bad-exit=1 bash -c 'exec $(dirname {python})/deepspeed --hostfile {folder}/hosts \\
  --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$head" --master_port "$port" \\
  train/main.py --config {config}'""",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_trainer_runs_under_other_launchers(
    cluster: Cluster, tmp_path: Path, launcher: str
) -> None:
    """srun alone finds its rendezvous itself; the others are started as docs/slurm.md says."""
    config = tiny_run(tmp_path)
    python = ENVIRONMENT["LECTERN_PYTHON"]
    script = LAUNCHERS[launcher].format(python=python, config=config, folder=tmp_path)
    job = cluster.submit(TWO_NODES, f"#!/bin/bash\n{script}\n", env=ENVIRONMENT)
    assert job.wait(200) == ("COMPLETED", "0:0"), job.log
    manifest = read_manifest(find_checkpoint(tmp_path / "run/stage1/checkpoints", None))
    assert (manifest.step, manifest.world_size) == (3, 2)


SICK = """
import os, sys
if os.environ.get("SLURMD_NODENAME") == "n1" and "launch.preflight.node_check" in sys.orig_argv:
    os._exit(1)
"""


@pytest.mark.slow
def test_a_bad_node_is_named_and_the_job_goes_on_elsewhere(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(SICK, encoding="utf-8")
    job = submit_stage(
        cluster,
        config,
        options=("--nodes=1", "--ntasks-per-node=1"),
        LECTERN_PREFLIGHT="on",
        PYTHONPATH=str(tmp_path),
    )
    assert job.wait(200) == ("COMPLETED", "0:0"), job.log
    assert f"job {job.number} avoids n1 from now on" in job.log
    assert "1 rank on 1 node (n2)" in job.log
    first, second = read_starts(tmp_path / "run/stage1")
    assert list(first.bad_nodes or {}) == ["n1"]
    assert (first.nodes, second.nodes, second.action) == (("n1",), ("n2",), "done")
