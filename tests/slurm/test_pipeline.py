"""The pipeline on a real Slurm: a whole chain, a stage that fails, a second submission, resume."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.pipeline.record import job_name
from tests.inference.oracle import export_tiny, page, png
from tests.launch.chains import figures, write_chain
from tests.launches import BIN, ROOT, run
from tests.slurm.cluster import Cluster, ClusterError
from tests.slurm.jobs import FINAL_STATES, Job, wait_until
from tests.slurm.runs import ENVIRONMENT

pytestmark = pytest.mark.slurm
STEPS = ["shard", "stage1", "convert1", "stage2", "convert2", "evaluate"]
CHAIN_S = 400


class Chain:
    """A chain of a test on a cluster."""

    def __init__(self, cluster: Cluster, config: Path) -> None:
        self.cluster, self.config, self.run = cluster, config, config.parent / "run"

    def call(self, *words: str) -> str:
        """Call the pipeline as on the login node; return its stdout."""
        command = [str(BIN / "python"), "-m", "launch.pipeline", str(self.config), *words]
        return self.cluster.run(*command, env=ENVIRONMENT, timeout_s=120)

    def fail(self, *words: str) -> str:
        """Call the pipeline, which must fail; return its message."""
        with pytest.raises(ClusterError) as caught:
            self.call(*words)
        return str(caught.value)

    def status(self) -> dict[str, dict[str, Any]]:
        """Return step -> row of `status --json`."""
        return {row["step"]: row for row in json.loads(self.call("status", "--json"))["steps"]}

    def ids(self) -> dict[str, str]:
        record = json.loads((self.run / "pipeline.json").read_text(encoding="utf-8"))
        return {name: job["job_id"] for name, job in record["jobs"].items()}

    def job(self, step: str) -> Job:
        log = ROOT / "logs" / f"{job_name(self.run, step)}-{self.ids()[step]}.out"
        return Job(self.ids()[step], log, self.cluster.run)

    def logs(self) -> str:
        """Return the logs of all jobs so far."""
        paths = sorted((ROOT / "logs").glob(f"{job_name(self.run, '*')}"))
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in paths)

    def wait(self, step: str) -> tuple[str, str]:
        """Return (state, exit code) of a step's job when it has ended."""
        job = self.job(step)
        wait_until(lambda: job.state in FINAL_STATES, CHAIN_S, self.logs, 0.5)
        return job.state, job.show()["ExitCode"]


@pytest.fixture
def chain_of(cluster: Cluster) -> Iterator[Any]:
    """Make chains; their logs, which lie in the clone, go with the test."""
    chains: list[Chain] = []

    def make(config: Path) -> Chain:
        chains.append(Chain(cluster, config))
        return chains[-1]

    yield make
    for chain in chains:
        for path in (ROOT / "logs").glob(job_name(chain.run, "*")):
            path.unlink()


@pytest.mark.timeout(900)
def test_a_chain_completes_with_the_figures_of_a_local_one(chain_of: Any, tmp_path: Path) -> None:
    chain = chain_of(write_chain(tmp_path / "jobs"))
    out = chain.call()
    assert re.findall(r"^(\w+) +job \d+ submitted", out, re.MULTILINE) == STEPS
    first = chain.ids()
    again = chain.call()
    assert "nothing to submit" in again and "submitted" not in again.split("nothing")[0]
    assert chain.ids() == first

    assert chain.wait("evaluate") == ("COMPLETED", "0:0"), chain.logs()
    for step in STEPS:
        assert chain.job(step).state == "COMPLETED", chain.logs()
    assert [row["state"] for row in chain.status().values()] == ["done"] * 6
    stage = chain.status()["stage2"]
    assert (stage["train_step"], stage["total_steps"]) == (3, 3)
    assert chain.call().count("done already") == 6

    local = write_chain(tmp_path / "local")
    command = [str(BIN / "python"), "-m", "launch.pipeline", str(local), "--local", "--ranks", "2"]
    outcome = run(command, timeout_s=CHAIN_S)
    assert outcome.code == 0, outcome.output
    jobs, here = figures(tmp_path / "jobs"), figures(tmp_path / "local")
    assert jobs == here
    assert jobs["report"]["num_samples"] == 4


@pytest.mark.timeout(600)
def test_a_failed_stage_cancels_its_dependants_and_resume_submits_what_is_missing(
    chain_of: Any, tmp_path: Path
) -> None:
    chain = chain_of(write_chain(tmp_path))
    few = ("--set", "stage1.set.data.packs_per_step=1")  # fewer than ranks: found by the trainer
    chain.call(*few)
    assert chain.wait("stage1") == ("FAILED", "2:0"), chain.logs()
    for step in STEPS[2:]:
        assert chain.wait(step)[0] == "CANCELLED", chain.logs()
    assert chain.job("shard").state == "COMPLETED"
    text = chain.fail(*few)
    job_id = chain.ids()["stage1"]
    assert "code 2" in text
    assert f"stage1 (job {job_id}) ended as FAILED with exit code 2" in text
    assert f"{job_name(chain.run, 'stage1')}-{job_id}.out" in text
    assert chain.status()["stage1"]["state"] == "FAILED"

    before = chain.ids()
    out = chain.call("resume")
    assert "shard     done already" in out
    assert re.findall(r"^(\w+) +job \d+ submitted", out, re.MULTILINE) == STEPS[1:]
    assert chain.ids()["shard"] == before["shard"]
    assert chain.wait("convert1") == ("COMPLETED", "0:0"), chain.logs()

    chain.call("cancel")
    for step in STEPS[3:]:
        assert chain.wait(step)[0] in ("CANCELLED", "FAILED"), chain.logs()
    chain.call("cancel")
    assert "stage2" in chain.fail()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cancel_lets_a_stage_save_and_resume_goes_on(chain_of: Any, tmp_path: Path) -> None:
    forever = ("--set", "stage1.set.stage.max_steps=100000")
    chain = chain_of(write_chain(tmp_path, stage2=None, evaluate=None))
    chain.call(*forever)
    chain.job("stage1").wait_for("step 2/", timeout_s=200)
    row = chain.status()["stage1"]
    assert row["state"] == "RUNNING" and row["train_step"] >= 1 and row["remaining_s"] > 0
    chain.call("cancel", *forever)
    assert chain.wait("stage1") == ("FAILED", "75:0"), chain.logs()
    assert chain.wait("convert1")[0] == "CANCELLED"
    saved = chain.status()["stage1"]["train_step"]
    chain.call("resume", "--set", f"stage1.set.stage.max_steps={saved + 1}")
    assert chain.wait("convert1") == ("COMPLETED", "0:0"), chain.logs()
    assert f"resumed at step {saved}" in chain.logs()


@pytest.mark.timeout(120)
def test_an_unknown_job_to_wait_for_is_refused(chain_of: Any, tmp_path: Path) -> None:
    chain = chain_of(write_chain(tmp_path))
    assert "--after 99999: Slurm knows no such job" in chain.fail("--after", "99999")
    assert not (chain.run / "pipeline.json").exists()


@pytest.mark.timeout(120)
def test_two_commands_at_the_same_time_submit_one_chain(
    chain_of: Any, cluster: Cluster, tmp_path: Path
) -> None:
    chain = chain_of(write_chain(tmp_path, stage2=None, evaluate=None))
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # nothing starts
    try:
        command = [str(BIN / "python"), "-m", "launch.pipeline", str(chain.config)]
        both = [
            subprocess.Popen(
                cluster.command(*command),
                cwd=ROOT,
                env=cluster.environment() | ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(2)
        ]
        outputs = [process.communicate(timeout=100)[0] for process in both]
        codes = sorted(process.returncode for process in both)
        queue = cluster.run("squeue", "-h", "-o", "%j").split()
        assert sorted(queue) == sorted(job_name(chain.run, step) for step in STEPS[:3]), outputs
        assert codes in ([0, 2], [0, 0]), outputs
        chain.call("cancel")
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "State=UP")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_array_reads_pages_and_an_interrupted_part_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    model, scans, out = export_tiny(tmp_path / "hf"), tmp_path / "scans", tmp_path / "read"
    scans.mkdir()
    for number in range(300):
        (scans / f"{number}.png").write_bytes(png(page(number % 200)))
    words = (str(model), f"{scans}/*.png", "--out", str(out), "--device", "cpu")
    slow = ("--max-new-tokens", "12", "--batch-size", "1")
    array = cluster.submit(("--array=0-1",), "slurm/predict.sh", *words, *slow, env=ENVIRONMENT)
    part = out / "part-00001-of-00002.jsonl"
    wait_until(lambda: part.exists() and part.read_bytes().count(b"\n") > 4, 100, cluster.logs)
    last = array.task(1)  # its own id is that of the array
    cluster.run("scancel", "--batch", "--signal=USR1", last.number)
    wait_until(lambda: "is interrupted; start it again" in last.log, 60, lambda: last.log)
    for task in (array.task(0), last):
        assert task.wait(150) == ("COMPLETED", "0:0"), task.log
    assert (array.task(0).restarts, last.restarts) == (0, 1)
    assert "documents are read" in last.log
    files = [json.loads(line)["file"] for path in out.glob("part-*.jsonl") for line in path.open()]
    assert sorted(files) == sorted(map(str, scans.iterdir()))

    again = cluster.submit(("--array=0-1",), "slurm/predict.sh", *words, *slow, env=ENVIRONMENT)
    for index in (0, 1):
        assert again.task(index).wait() == ("COMPLETED", "0:0")
        assert f"part-0000{index}-of-00002 is done already" in again.task(index).log
