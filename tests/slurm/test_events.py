"""What happens to jobs on a real cluster, and that the run ends as if nothing had happened.

Every test trains the same tiny stage. At the same number of ranks all tensors of the last
checkpoint (weights, moments, random state) and all losses are bitwise those of an undisturbed run.
"""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.starts import read_starts
from tests.harness import run_ranks
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, wait_until
from tests.slurm.runs import TWO_NODES, submit_stage, tiny_run
from tests.train.engines import whole_state
from tests.train.trainers import losses_of, start
from train.checkpoint.manifest import list_checkpoints
from train.ownership import read_owner

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

STEPS, EVERY, EVENT_STEP = 26, 4, 6
CURVE_STEPS, CURVE_RTOL = 20, 1e-5  # float32 sums in another order, see tests/train/test_elastic.py
# One rank a node; with --ntasks-per-node=1 Slurm would be content with one node.
ONE_OR_TWO_NODES = ("--nodes=1-2",)
EITHER_NODE = pytest.mark.parametrize("node", ["n1", "n2"], ids=["batch host", "other node"])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(
        tmp_path_factory.mktemp("stage"),
        stage={"max_steps": STEPS, "epochs": 1000},
        checkpoint={"every_steps": EVERY, "keep_last": 100},
    )


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, config: Path) -> Path:
    """Return RUN/stage1 of two ranks that were left alone."""
    job = submit_stage(cluster, config)
    assert job.wait(200) == ("COMPLETED", "0:0"), job.log
    return config.parent / "run" / "stage1"


class Disturbed:
    """A job that has reached the step at which something happens to it."""

    def __init__(
        self,
        cluster: Cluster,
        config: Path,
        folder: Path,
        options: Sequence[str] = TWO_NODES,
    ) -> None:
        self.stage = folder / "run" / "stage1"
        self.overrides = (f"run.dir={folder}/run",)
        self.job = submit_stage(cluster, config, *self.overrides, options=options)
        self.job.wait_for(f"step {EVENT_STEP}/")

    def ends_like(self, undisturbed: Path) -> None:
        """Check that it resumed, completed, and holds what the undisturbed run holds."""
        assert self.job.wait(300) == ("COMPLETED", "0:0"), self.job.log
        assert self.job.restarts >= 1
        assert "resumed at step" in self.job.log
        assert_equal(self.stage, undisturbed)


def assert_equal(stage: Path, undisturbed: Path) -> None:
    """Check that two runs have the same losses and the same last checkpoint, to the bit."""
    assert losses_of(stage) == losses_of(undisturbed)
    expected, found = last_tensors(undisturbed), last_tensors(stage)
    assert found.keys() == expected.keys()
    differing = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not differing, differing[:5]


def last_tensors(stage: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the last checkpoint, which must be that of the last step."""
    step, folder = max(list_checkpoints(stage / "checkpoints"))
    assert step == STEPS
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def resumed_at(job: Job) -> int:
    return int(job.log.rpartition("resumed at step ")[2].split()[0].rstrip(",.:"))


def test_usr1_saves_and_the_job_goes_on_before_what_waits_for_it(
    cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = Disturbed(cluster, config, tmp_path)
    waiting = ["--kill-on-invalid-dep=yes", f"--dependency=afterok:{run.job.number}"]
    child = cluster.submit(waiting, "#!/bin/bash\n")
    cluster.run("scancel", "--batch", "--signal=USR1", run.job.number)
    run.job.wait_for_state("PENDING")
    assert child.state == "PENDING"
    run.ends_like(undisturbed)
    assert resumed_at(run.job) >= EVENT_STEP, "what was done by then is saved"
    assert child.wait() == ("COMPLETED", "0:0")
    assert run.job.show()["EndTime"] <= child.show()["StartTime"]


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(
    cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = Disturbed(cluster, config, tmp_path)
    run.job.signal_rank(1, signal.SIGKILL)
    run.ends_like(undisturbed)
    assert resumed_at(run.job) % EVERY == 0
    first, second = read_starts(run.stage)
    assert "a rank was killed" in first.reason and first.is_failure
    assert second.action == "done"


def test_a_cancelled_job_saves_and_stays_cancelled(
    config: Path, undisturbed: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Time between TERM and KILL to come to a decision: to requeue would bring the job back.
    with Cluster(tmp_path_factory.mktemp("c"), kill_wait_s=15) as cluster:
        run = Disturbed(cluster, config, tmp_path)
        cluster.run("scancel", run.job.number)
        assert run.job.wait()[0] == "CANCELLED"
        assert "leave: the job was cancelled" in run.job.log
        again = submit_stage(cluster, config, *run.overrides)
        assert again.wait(200) == ("COMPLETED", "0:0"), again.log
        assert resumed_at(again) >= EVENT_STEP
        assert_equal(run.stage, undisturbed)
        assert run.job.state == "CANCELLED" and run.job.restarts == 0


@pytest.mark.slow
class TestEndedBySlurm:
    @pytest.mark.parametrize(
        "command", [["scontrol", "requeue"], ["scancel", "--signal=TERM"]], ids=" ".join
    )
    def test_an_operator_ends_a_start(
        self,
        cluster: Cluster,
        config: Path,
        undisturbed: Path,
        tmp_path: Path,
        command: list[str],
    ) -> None:
        run = Disturbed(cluster, config, tmp_path)
        cluster.run(*command, run.job.number)
        run.ends_like(undisturbed)
        assert resumed_at(run.job) >= EVENT_STEP

    @pytest.mark.parametrize("warns_with_usr1", [False, True])
    def test_a_more_important_job_takes_the_nodes(
        self,
        config: Path,
        undisturbed: Path,
        tmp_path: Path,
        tmp_path_factory: pytest.TempPathFactory,
        warns_with_usr1: bool,
    ) -> None:
        folder = tmp_path_factory.mktemp("c")
        with Cluster(folder, preempt_signal=warns_with_usr1, grace_s=10) as cluster:
            run = Disturbed(cluster, config, tmp_path, (*TWO_NODES, "--partition=low"))
            important = ["--partition=high", "--nodes=2", "--exclusive"]
            other = cluster.submit(important, "#!/bin/bash\nsleep 2")
            assert other.wait() == ("COMPLETED", "0:0")
            run.ends_like(undisturbed)
            assert resumed_at(run.job) >= EVENT_STEP

    def test_a_time_limit_chains_on_by_itself(
        self, cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
    ) -> None:
        limit = ("--time=1", "--signal=B:USR1@5")
        run = Disturbed(cluster, config, tmp_path, (*TWO_NODES, *limit))
        run.job.signal_rank(1, signal.SIGSTOP)  # until the limit, at which Slurm wakes all up
        run.job.wait_for("resumed at step", 200)
        run.ends_like(undisturbed)
        assert resumed_at(run.job) >= EVENT_STEP


@pytest.mark.slow
class TestLostNodes:
    @EITHER_NODE
    @pytest.mark.parametrize("kind", ["cluster", "netns_cluster"], ids=["reset", "silence"])
    def test_two_nodes_go_on_when_the_lost_one_is_back(
        self,
        request: pytest.FixtureRequest,
        config: Path,
        undisturbed: Path,
        tmp_path: Path,
        kind: str,
        node: str,
    ) -> None:
        cluster = request.getfixturevalue(kind)
        run = Disturbed(cluster, config, tmp_path)
        cluster.kill_node(node)
        run.job.wait_for_state("PENDING")
        cluster.start_node(node)
        run.ends_like(undisturbed)

    @EITHER_NODE
    def test_one_node_goes_on_alone(
        self, cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path, node: str
    ) -> None:
        run = Disturbed(cluster, config, tmp_path, ONE_OR_TWO_NODES)
        assert run.job.show()["NumNodes"] == "2"
        cluster.kill_node(node)
        assert run.job.wait(300) == ("COMPLETED", "0:0"), run.job.log
        assert run.job.show()["NumNodes"] == "1"
        step = resumed_at(run.job)
        assert step % EVERY == 0 and 0 < step <= STEPS - CURVE_STEPS
        losses, expected = losses_of(run.stage), losses_of(undisturbed)
        assert losses[:step] == expected[:step]
        assert len(losses) == STEPS
        assert losses[step:] == pytest.approx(expected[step:], rel=CURVE_RTOL)

        two, one = (self._loaded(run.stage, step, n, config, tmp_path) for n in (2, 1))
        assert two.keys() == one.keys()
        assert all(torch.equal(two[name], one[name]) for name in two)

    def _loaded(
        self, stage: Path, step: int, world_size: int, config: Path, folder: Path
    ) -> dict[str, torch.Tensor]:
        """Return the whole state that some ranks hold when they have loaded a step."""
        folder /= f"loaded-{world_size}"
        checkpoint = dict(list_checkpoints(stage / "checkpoints"))[step]
        (folder / "run/stage1/checkpoints").mkdir(parents=True)
        (folder / "run/stage1/checkpoints" / checkpoint.name).symlink_to(checkpoint)
        text = config.read_text(encoding="utf-8")
        copied = folder / "stage1.yaml"
        copied.write_text(text.replace(str(config.parent / "run"), str(folder / "run")))
        return run_ranks(world_size, _whole_state, copied, step, timeout_s=100)[0]

    def test_a_start_that_was_cut_off_writes_nothing_more(
        self, netns_cluster: Cluster, config: Path, tmp_path: Path
    ) -> None:
        """A trainer of one node sees nothing of the cut, and trains on beside its successor."""
        one_node = ("--nodes=1", "--ntasks-per-node=1")
        alone = submit_stage(netns_cluster, config, f"run.dir={tmp_path}/alone", options=one_node)
        assert alone.wait(200) == ("COMPLETED", "0:0"), alone.log

        run = Disturbed(netns_cluster, config, tmp_path, one_node)
        node, trainer = run.job.show()["NodeList"], run.job.rank_process(0)
        owner = read_owner(run.stage)
        os.kill(trainer, signal.SIGSTOP)
        netns_cluster.cut_network(node)
        run.job.wait_for("resumed at step")
        os.kill(trainer, signal.SIGCONT)
        wait_until(lambda: not _is_running(trainer), 60, lambda: "the old trainer trains on")
        assert run.job.wait(200) == ("COMPLETED", "0:0"), run.job.log
        assert run.job.show()["NodeList"] != node
        assert "was taken over" in run.job.log
        assert read_owner(run.stage) != owner
        status = json.loads((run.stage / "status.json").read_text(encoding="utf-8"))
        assert status["state"] == "done"
        assert_equal(run.stage, tmp_path / "alone" / "stage1")
        netns_cluster.join_network(node)


def _whole_state(config: Path, step: int) -> dict[str, torch.Tensor]:
    trainer = start(config)
    assert trainer.step == step
    return whole_state(trainer.engine)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
