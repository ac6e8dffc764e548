"""The tests' own cluster does what a real one does, as far as the other tests rely on it."""

import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, slurm_missing
from tests.slurm.jobs import find_processes, wait_until
from tests.slurm.settings import PORTS, Settings, loopback_addresses, write_configuration

slurm = [pytest.mark.slurm, pytest.mark.timeout(120)]
START = "#!/bin/bash\necho start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST\n"
UNTIL = START + "while [ ! -e $1 ]; do sleep 0.2; done"
ONCE = START + '[ -n "$SLURM_RESTART_COUNT" ] && exit\n'  # goes on in its first start only


def test_the_configuration_holds_what_was_asked_for(tmp_path: Path) -> None:
    settings = Settings(nodes=3, gpus=2, grace_s=7, options={"KillWait": "9", "JobRequeue": "0"})
    addresses = loopback_addresses(settings.node_names)
    lines = write_configuration(tmp_path, settings, addresses).read_text().splitlines()
    assert "KillWait=9" in lines and "JobRequeue=0" in lines
    assert sum(line.startswith("NodeName=") and "Gres=gpu:2" in line for line in lines) == 3
    assert any(line.startswith("PartitionName=low") and "GraceTime=7" in line for line in lines)
    ports = [address.port for address in addresses.values()]
    assert len(set(ports)) == 4 and set(ports) <= set(PORTS)
    assert (tmp_path / "gres.conf").read_text().count("Name=gpu") == 6


class TestCluster:
    pytestmark = slurm

    def test_a_job_completes_with_its_own_exit_code(self, cluster: Cluster) -> None:
        script = "#!/bin/bash\nsrun --label bash -c 'echo $SLURM_PROCID of $SLURM_NTASKS'; exit $1"
        good = cluster.submit(["--nodes=2"], script, "0")
        bad = cluster.submit(["--nodes=2"], script, "7")
        assert good.wait() == ("COMPLETED", "0:0"), good.log
        assert bad.wait() == ("FAILED", "7:0")
        assert sorted(good.log.split("\n")) == ["", "0: 0 of 2", "1: 1 of 2"]

    def test_a_requeued_job_counts_and_appends_to_its_log(self, cluster: Cluster) -> None:
        script = ONCE + "scontrol requeue $SLURM_JOB_ID; sleep 600"
        job = cluster.submit(["--open-mode=append"], script)
        assert job.wait() == ("COMPLETED", "0:0")
        assert job.restarts == 1
        assert "start 0" in job.log and "start 1" in job.log

    def test_an_array_runs_every_task(self, cluster: Cluster) -> None:
        script = '#!/bin/bash\necho "task $SLURM_ARRAY_TASK_ID"; exit $SLURM_ARRAY_TASK_ID'
        array = cluster.submit(["--array=0-2%2"], script)
        ends = [array.task(index).wait() for index in range(3)]
        assert ends == [("COMPLETED", "0:0"), ("FAILED", "1:0"), ("FAILED", "2:0")]
        assert [array.task(i).log for i in range(3)] == [f"task {i}\n" for i in range(3)]

    def test_a_failed_job_cancels_what_depends_on_it(self, cluster: Cluster) -> None:
        first = cluster.submit([], "#!/bin/bash\nsleep 1; exit $1", "0")
        failing = cluster.submit([], "#!/bin/bash\nsleep 1; exit $1", "5")
        needs = ["--kill-on-invalid-dep=yes", "--dependency"]
        after = cluster.submit([*needs, f"afterok:{first.number}"], START)
        never = cluster.submit([*needs, f"afterok:{failing.number}"], START)
        assert after.wait() == ("COMPLETED", "0:0")
        assert never.wait()[0] == "CANCELLED"
        assert first.show()["EndTime"] <= after.show()["StartTime"]

    def test_a_job_leaves_a_dead_node_for_a_living_one(self, cluster: Cluster) -> None:
        job = cluster.submit(["--requeue", "--open-mode=append"], ONCE + "srun sleep 600")
        job.wait_for("start 0 on n1")
        wait_until(lambda: len(job.processes()) >= 3, 20, lambda: str(job.processes()))
        cluster.kill_node("n1")
        assert not job.processes()
        assert job.wait() == ("COMPLETED", "0:0")
        assert "start 1 on n2" in job.log
        assert cluster.run("sinfo", "-h", "-n", "n1", "-p", "main", "-o", "%T").startswith("down")
        cluster.start_node("n1")

    def test_a_node_without_its_daemon_keeps_its_steps(self, cluster: Cluster) -> None:
        go = cluster.folder / "daemon-is-back"
        job = cluster.submit([], UNTIL, str(go))
        job.wait_for("start")
        cluster.stop_slurmd("n1")
        assert job.processes()
        cluster.start_node("n1")
        go.touch()
        assert job.wait() == ("COMPLETED", "0:0") and job.restarts == 0

    def test_a_job_outlives_the_controller(self, cluster: Cluster) -> None:
        go = cluster.folder / "controller-is-back"
        job = cluster.submit([], UNTIL, str(go))
        job.wait_for("start")
        cluster.kill_controller()
        cluster.start_controller()
        go.touch()
        assert job.wait() == ("COMPLETED", "0:0")

    def test_a_test_finds_the_cluster_as_it_was(self, cluster: Cluster) -> None:
        jobs = [cluster.submit(["--nodes=2", "--exclusive"], START + "sleep 600") for _ in "ab"]
        jobs[0].wait_for("start")
        cluster.kill_controller()
        cluster.kill_node("n2")
        cluster.restore()
        states = cluster.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
        assert states == ["idle", "idle"]
        assert not cluster.run("squeue", "-h")

    def test_a_foreign_slurms_variables_stay_outside(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK"):
            monkeypatch.setenv(name, "1")
        assert not {"SLURM_JOB_ID", "SBATCH_PARTITION"} & set(cluster.environment())
        assert cluster.submit([], START).wait() == ("COMPLETED", "0:0")


class TestFakeGpus:
    pytestmark = slurm

    def test_are_counted_and_assigned(self, gpu_cluster: Cluster) -> None:
        script = "#!/bin/bash\necho $CUDA_VISIBLE_DEVICES of $SLURM_GPUS_ON_NODE; sleep 2"
        jobs = [gpu_cluster.submit(["--gpus-per-node=1", "-w", "n1"], script) for _ in "ab"]
        assert [job.wait() for job in jobs] == [("COMPLETED", "0:0")] * 2
        assert sorted(job.log for job in jobs) == ["0 of 1\n", "1 of 1\n"]
        with pytest.raises(ClusterError, match="not available"):
            gpu_cluster.submit(["--gpus-per-node=3"], script)


class TestNetworks:
    pytestmark = slurm

    def test_nodes_have_names_and_a_cable_can_be_pulled(self, netns_cluster: Cluster) -> None:
        script = "#!/bin/bash\necho on $(hostname); srun bash -c 'getent hosts n1 n2; sleep 600'"
        job = netns_cluster.submit(["--nodes=2", "--requeue", "--open-mode=append"], script)
        job.wait_for("on n1")
        wait_until(lambda: job.log.count("10.213.0.") == 4, 20, lambda: job.log)
        cut_off = find_processes({"SLURM_JOB_ID": job.number, "SLURMD_NODENAME": "n2"})
        netns_cluster.cut_network("n2")
        job.wait_for_state("PENDING")
        assert all(process.is_running() for process in cut_off)  # nobody can tell it to end
        netns_cluster.join_network("n2")
        wait_until(lambda: not any(p.is_running() for p in cut_off), 30, lambda: str(cut_off))


@pytest.mark.slurm
def test_nothing_is_left_of_a_cluster(tmp_path: Path) -> None:
    if reason := slurm_missing():
        pytest.skip(reason)
    # A child in its own session, orphaned, survives the end of its job.
    script = "#!/bin/bash\nsetsid -f sleep 611\nsrun sleep 612 & echo start; wait"
    with Cluster(tmp_path / "c", nodes=1) as cluster:
        environment = {"SLURM_CONF": cluster.environment()["SLURM_CONF"]}
        cluster.submit([], script).wait_for("start")
        wait_until(lambda: len(find_processes(environment)) >= 6, 20, lambda: "too few processes")
    assert not find_processes(environment)
    assert not cluster.folder.exists()


@pytest.mark.slurm
def test_a_cluster_that_does_not_come_up_shows_its_logs(tmp_path: Path) -> None:
    if reason := slurm_missing():
        pytest.skip(reason)
    start_s = time.monotonic()
    with pytest.raises(AssertionError, match="slurmctld has ended") as caught:
        Cluster(tmp_path / "c", options={"SelectType": "select/none_such"}).__enter__()
    assert "select/none_such" in "".join(caught.value.__notes__)
    assert not (tmp_path / "c").exists()
    assert time.monotonic() - start_s < 20
