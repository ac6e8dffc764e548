"""`python -m train.checkpoint`: list, verify, remove and fetch, and never the last whole one."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_tools.errors import CheckpointError
from tests.train.checkpoint_files import write_checkpoint
from train.checkpoint.__main__ import list_steps, main
from train.checkpoint.manifest import verify
from train.checkpoint.mirror import Mirror
from train.checkpoint.retention import Retention


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / "checkpoints", {"fp32|a": torch.randn(9)}, 2, step)
    (tmp_path / "status.json").write_text('{"best_step": 2}')
    return tmp_path


def test_every_step_is_listed_with_what_is_wrong(
    stage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage / "checkpoints" / "step-00000001" / "shard-00001-of-00002.safetensors").unlink()
    (stage / "checkpoints" / "step-00000003" / "manifest.json").write_text("{")
    assert main(["ls", str(stage)]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert "shard-00001-of-00002.safetensors is missing" in first
    assert "2 ranks" in second and second.endswith("best")
    assert "not a readable manifest" in third
    assert [row["step"] for row in list_steps(stage)] == [1, 2, 3]
    assert main(["ls", str(stage / "nowhere")]) == 0
    assert "no checkpoint" in capsys.readouterr().out


def test_verify_reads_every_byte(stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(stage)]) == 0
    assert capsys.readouterr().out == "step 1: whole\nstep 2: whole\nstep 3: whole\n"
    path = stage / "checkpoints" / "step-00000002" / "shard-00000-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(stage)]) == 2
    assert "its CRC-32 differs" in capsys.readouterr().out
    assert main(["verify", str(stage), "--step", "3"]) == 0
    with pytest.raises(CheckpointError, match="no checkpoint of step 9 to verify"):
        main(["verify", str(stage), "--step", "9"])


def test_the_newest_whole_one_is_never_removed(stage: Path) -> None:
    (stage / "checkpoints" / "step-00000003" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="step-00000002 is the newest whole checkpoint"):
        main(["rm", str(stage), "--step", "1", "--step", "2"])
    assert [row["step"] for row in list_steps(stage)] == [1, 2, 3], "all or nothing"
    assert main(["rm", str(stage), "--step", "1", "--step", "3"]) == 0
    assert [row["step"] for row in list_steps(stage)] == [2]
    with pytest.raises(CheckpointError, match="no checkpoint of step 1; there are: 2"):
        main(["rm", str(stage), "--step", "1"])


def test_a_mirror_has_the_manifest_last_and_gives_checkpoints_back(
    stage: Path, tmp_path: Path
) -> None:
    mirror = Mirror(f"memory://mirror-{time.time_ns()}/stage2")
    for step in (1, 2, 3):
        checkpoint = stage / "checkpoints" / f"step-{step:08d}"
        for shard in sorted(checkpoint.glob("shard-*")):
            mirror.put_shard([checkpoint / "gone", shard], checkpoint.name)
        assert step not in mirror.steps()
        mirror.finish(checkpoint, Retention(2), step)
    assert mirror.steps() == [2, 3]
    assert main(["fetch", mirror.url, str(tmp_path / "other")]) == 0
    fetched = tmp_path / "other" / "checkpoints" / "step-00000003"
    assert verify(fetched) == []
    assert main(["fetch", mirror.url, str(tmp_path / "other")]) == 0, "typed twice"
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are: \[2, 3\]"):
        main(["fetch", mirror.url, str(tmp_path / "other"), "--step", "7"])


def test_retention_keeps_the_newest_the_best_and_every_nth() -> None:
    steps = range(100, 1100, 100)
    assert Retention(2).surplus(steps, 1000) == list(range(100, 900, 100))
    assert Retention(0).surplus(steps, 1000) == []
    kept = set(steps) - set(Retention(1, every=300, best=500).surplus(steps, 1000))
    assert kept == {300, 500, 600, 900, 1000}
    assert Retention(1).surplus(steps, 300) == [100, 200], "later ones are left alone"


def test_the_command_starts_without_deepspeed() -> None:
    code = "import sys, train.checkpoint.__main__; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
