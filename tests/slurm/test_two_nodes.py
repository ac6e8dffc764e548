"""The job scripts on a real Slurm cluster: two nodes, one rank each, over gloo.

Run by `make test-slurm` where sbatch works; skipped elsewhere. Finished jobs are looked up with
`scontrol show job`, so that no accounting database is needed.
"""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.builders import run_record, write_run, write_shards
from tests.launches import BIN, ROOT
from tests.train.tiny import tiny_folder
from train.checkpoint.manifest import find_checkpoint, read_manifest

pytestmark = pytest.mark.slurm

JOB_TIMEOUT_S = 240
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@dataclass(frozen=True)
class Job:
    number: str
    log_path: Path

    def show(self) -> dict[str, str]:
        """Return what Slurm knows of the job, JobState and ExitCode among it."""
        text = _client("scontrol", "-o", "show", "job", self.number)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8") if self.log_path.exists() else ""

    def wait(self) -> tuple[str, str]:
        """Return (state, exit code) of the ended job; cancel one that takes too long."""
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while time.monotonic() < deadline:
            about = self.show()
            if about["JobState"] in FINAL_STATES:
                return about["JobState"], about["ExitCode"]
            time.sleep(0.5)
        _client("scancel", self.number)
        pytest.fail(f"job {self.number} did not end in {JOB_TIMEOUT_S} s:\n{self.log}")

    def wait_for(self, text: str) -> None:
        """Wait until the log holds a text."""
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while text not in self.log:
            assert time.monotonic() < deadline, self.log
            assert self.show()["JobState"] not in FINAL_STATES, self.log
            time.sleep(0.2)


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> None:
    for program in ("sbatch", "scontrol"):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} on this machine")
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=30)
    if ping.returncode or "UP" not in ping.stdout:
        pytest.skip(f"no Slurm controller answers: {(ping.stdout + ping.stderr).strip()}")


def submit(folder: Path, options: tuple[str, ...], script: str, *arguments: str) -> Job:
    environment = os.environ | {
        "LECTERN_PYTHON": str(BIN / "python"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    output = f"--output={folder}/{Path(script).stem}-%j.out"
    number = _client(
        "sbatch", "--parsable", output, *options, script, *arguments, environment=environment
    )
    number = number.strip()
    return Job(number, folder / f"{Path(script).stem}-{number}.out")


def tiny_run(folder: Path, **changes: dict) -> Path:
    """Write a model, shards and the configuration of a stage 1; return the configuration."""
    model = tiny_folder(folder / "model")
    shards = write_shards(folder / "shards", [12, 12])
    record = run_record(folder / "run", model, shards, stage={"number": 1, "max_steps": 3})
    for section, change in changes.items():
        record[section] |= change
    return write_run(folder / "stage1.yaml", record)


def test_a_stage_trains_on_two_nodes_and_is_converted(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    job = submit(tmp_path, TWO_NODES, "slurm/stage1.sh", str(config), "run.seed=3")
    assert job.wait() == ("COMPLETED", "0:0"), job.log
    assert re.search(r"2 ranks on 2 nodes .* rendezvous at \S+:2\d{4}\b", job.log), job.log
    stage = tmp_path / "run" / "stage1"
    manifest = read_manifest(find_checkpoint(stage / "checkpoints", None))
    assert (manifest.step, manifest.world_size) == (3, 2)
    assert "seed: 3" in (stage / "config.yaml").read_text(encoding="utf-8")

    convert = submit(tmp_path, (), "slurm/convert.sh", str(stage), "--dtype", "fp32")
    assert convert.wait() == ("COMPLETED", "0:0"), convert.log
    with safe_open(stage / "hf" / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
    assert any(name.startswith("visual.") for name in names)
    assert (stage / "hf" / "lectern.json").exists()


def test_an_unknown_key_fails_with_the_trainers_exit_code_and_message(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    job = submit(tmp_path, TWO_NODES, "slurm/stage1.sh", str(config), "optim.lr_vison=1e-5")
    assert job.wait() == ("FAILED", "2:0"), job.log
    assert "optim.lr_vison is not a known key" in job.log
    assert "Traceback" not in job.log


def test_usr1_to_the_batch_shell_saves_and_a_new_job_goes_on(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, stage={"max_steps": 100_000, "epochs": 100_000})
    job = submit(tmp_path, TWO_NODES, "slurm/stage1.sh", str(config))
    job.wait_for("step 1/")
    _client("scancel", "--batch", "--signal=USR1", job.number)
    assert job.wait() == ("FAILED", "75:0"), job.log
    assert "signal: saved at step" in job.log
    saved = read_manifest(find_checkpoint(tmp_path / "run/stage1/checkpoints", None)).step

    again = submit(
        tmp_path, TWO_NODES, "slurm/stage1.sh", str(config), f"stage.max_steps={saved + 2}"
    )
    assert again.wait() == ("COMPLETED", "0:0"), again.log
    assert f"resumed at step {saved}" in again.log


def test_a_killed_rank_ends_the_job_with_its_own_exit_code(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, stage={"max_steps": 100_000, "epochs": 100_000})
    job = submit(tmp_path, TWO_NODES, "slurm/stage1.sh", str(config))
    job.wait_for("step 1/")
    _kill_rank(job.number, rank=1)
    assert job.wait() == ("FAILED", "137:0"), job.log


def _kill_rank(job_number: str, rank: int) -> None:
    """SIGKILL the trainer of a rank, as the kernel does when memory runs out."""
    wanted = {f"SLURM_JOB_ID={job_number}".encode(), f"SLURM_PROCID={rank}".encode()}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or not _is_trainer(process):
            continue
        if wanted <= set((process / "environ").read_bytes().split(b"\0")):
            os.kill(int(process.name), 9)
            return
    pytest.skip("the nodes are other machines: their processes cannot be seen from here")


def _is_trainer(process: Path) -> bool:
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has ended meanwhile
        return False
    return arguments[1:2] == [b"train/main.py"]


def _client(*command: str, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
    return result.stdout
