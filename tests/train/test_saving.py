"""Saving behind the back of training: nothing waits but for a copy, nothing half is ever seen."""

import errno
import logging
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.errors import CheckpointError
from tests.harness import run_ranks
from tests.train.crash import _manifest, _snapshot, first_state
from tests.train.engines import build_engine, train, whole_state
from tests.train.tiny import tiny_model
from train.checkpoint import (
    CheckpointSaver,
    SaveSettings,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    newest_valid,
    verify,
)
from train.checkpoint import write as write_module
from train.checkpoint.mirror import Mirror
from train.checkpoint.retention import Retention
from train.checkpoint.save import prepare
from train.checkpoint.write import Destination, nearby_prefix, write_rank

SLOW_S = 1.0


def steps_of(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


def save_behind_the_back(folder: Path) -> None:
    """Two ranks, rank 1 with a slow disk."""
    rank = torch.distributed.get_rank()
    original = write_module.write_safetensors

    def slowly(*arguments: Any, **options: Any) -> int:
        time.sleep(SLOW_S * rank)
        return original(*arguments, **options)

    write_module.write_safetensors = slowly
    engine = build_engine(tiny_model())
    train(engine, 0, 1)
    saver = CheckpointSaver(engine, folder, SaveSettings(on_error="stop"))
    saver.save(1, {"n": 1})
    assert saver.blocked_s < SLOW_S / 2
    state = whole_state(engine)
    train(engine, 1, 1)  # changes what was copied, not the copy
    assert steps_of(folder) == [], "not before the slowest rank is done"
    started = time.perf_counter()
    saver.save(2, {"n": 2})
    assert time.perf_counter() - started > 0.2 and steps_of(folder) == [1], "one save at a time"
    saver.close()
    saver.close()
    assert steps_of(folder) == [1, 2] and (folder / "latest").read_text() == "step-00000002\n"
    torch.distributed.barrier()
    again = build_engine(tiny_model(seed=3))
    assert load_checkpoint(again, folder / "step-00000001") == {"n": 1}
    restored = whole_state(again)
    assert all(torch.equal(restored[name], value) for name, value in state.items())
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    assert not list(folder.rglob("*.note"))


def test_training_goes_on_while_a_slow_disk_is_written_to(tmp_path: Path) -> None:
    run_ranks(2, save_behind_the_back, tmp_path, timeout_s=90)


def save_everywhere(folder: Path) -> None:
    """Two ranks: first to a disk of their own, then to the shared folder, then to a mirror."""
    rank = torch.distributed.get_rank()
    settings = SaveSettings(
        keep_last=2,
        keep_every=4,
        local_dir=str(folder / f"disk-of-{rank}"),
        mirror=f"file://{folder}/mirror/stage2",
        on_error="stop",
    )
    engine = build_engine(tiny_model())
    saver = CheckpointSaver(engine, folder / "checkpoints", settings)
    for step in range(1, 8):
        train(engine, step, 1)
        saver.save(step, {"n": step}, best_step=2)
    saver.close()
    torch.distributed.barrier()
    assert steps_of(folder / "checkpoints") == [2, 4, 6, 7]
    assert Mirror(settings.mirror or "").steps() == [2, 4, 6, 7]
    assert list((folder / f"disk-of-{rank}").iterdir()) == []


def test_local_disk_shared_folder_and_mirror_keep_the_same_steps(tmp_path: Path) -> None:
    run_ranks(2, save_everywhere, tmp_path, timeout_s=90)
    for step in (2, 4, 6, 7):
        name = f"step-{step:08d}"
        assert verify(tmp_path / "checkpoints" / name) == []
        assert verify(tmp_path / "mirror" / "stage2" / name) == []
    shutil.rmtree(tmp_path / "checkpoints")
    Mirror(f"file://{tmp_path}/mirror/stage2").fetch(tmp_path / "checkpoints")
    assert steps_of(tmp_path / "checkpoints") == [7]


def save_on_a_shared_disk(folder: Path) -> None:
    """Two ranks of one node, whose disk still holds what a killed run left; rank 1 copies late."""
    rank = torch.distributed.get_rank()
    original = write_module._copy

    def late(*arguments: Any) -> None:
        time.sleep(SLOW_S / 2 * rank)
        original(*arguments)

    write_module._copy = late
    disk = folder / "disk"
    if rank == 0:
        (disk / f"{nearby_prefix(folder / 'checkpoints')}.tmp-step-00000009-x-0").mkdir(
            parents=True
        )
        (disk / f"{nearby_prefix(folder / 'other')}.tmp-step-00000009-x-0").mkdir()
    torch.distributed.barrier()
    engine = build_engine(tiny_model())
    settings = SaveSettings(local_dir=str(disk), on_error="stop", timeout_s=10)
    saver = CheckpointSaver(engine, folder / "checkpoints", settings)
    for step in (1, 2, 3):
        saver.save(step, {})
    saver.close()
    torch.distributed.barrier()
    assert steps_of(folder / "checkpoints") == [2, 3]
    left = [path.name for path in disk.iterdir()]
    assert left == [f"{nearby_prefix(folder / 'other')}.tmp-step-00000009-x-0"], "of another run"


def test_ranks_of_a_node_share_its_disk(tmp_path: Path) -> None:
    run_ranks(2, save_on_a_shared_disk, tmp_path, timeout_s=60)


def save_without_a_mirror(folder: Path, broken_rank: int) -> None:
    """Two ranks, one of which cannot reach the mirror: nobody waits for it, nothing is lost."""
    if torch.distributed.get_rank() == broken_rank:

        def refuse(*_: Any) -> None:
            raise CheckpointError("no route to the bucket")

        Mirror.put_shard = refuse  # type: ignore[method-assign]
    engine = build_engine(tiny_model())
    settings = SaveSettings(mirror=f"file://{folder}/mirror/stage2", timeout_s=300)
    saver = CheckpointSaver(engine, folder / "checkpoints", settings)
    saver.save(1, {})
    saver.close()
    torch.distributed.barrier()
    assert verify(folder / "checkpoints" / "step-00000001") == []
    assert not list(folder.rglob("*.note")) and Mirror(settings.mirror or "").steps() == []
    strict = CheckpointSaver(engine, folder / "checkpoints", replace(settings, on_error="stop"))
    strict.save(2, {})
    with pytest.raises(CheckpointError, match=r"step-00000002 has no copy at file.*no route"):
        strict.close()


@pytest.mark.timeout(100)
@pytest.mark.parametrize("broken_rank", [0, 1])
def test_a_mirror_that_is_down_costs_no_checkpoint(tmp_path: Path, broken_rank: int) -> None:
    run_ranks(2, save_without_a_mirror, tmp_path, broken_rank, timeout_s=60)


def fail_with_another_error(folder: Path) -> None:
    """A defect in the writing thread of rank 1 is told at once as well."""
    if torch.distributed.get_rank() == 1:

        def broken(*_: Any, **__: Any) -> int:
            raise ValueError("not an OSError")

        write_module.write_safetensors = broken
    settings = SaveSettings(on_error="stop", timeout_s=300)
    saver = CheckpointSaver(build_engine(tiny_model()), folder, settings)
    saver.save(1, {})
    with pytest.raises(CheckpointError, match="not an OSError"):
        saver.close()


@pytest.mark.timeout(100)
def test_any_error_of_a_rank_reaches_the_others(tmp_path: Path) -> None:
    run_ranks(2, fail_with_another_error, tmp_path, timeout_s=60)


def fail_on_one_rank(folder: Path) -> None:
    """Two ranks: a full disk on rank 1 costs a checkpoint, not the run; the next one is whole."""
    rank = torch.distributed.get_rank()
    original = write_module.write_safetensors

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    engine = build_engine(tiny_model())
    saver = CheckpointSaver(engine, folder, SaveSettings(keep_last=1))
    saver.save(1, {})
    saver.wait()
    if rank == 1:
        write_module.write_safetensors = full
    saver.save(2, {})
    saver.wait()
    assert steps_of(folder) == [1], "nothing half, and nothing deleted for it"
    assert not list(folder.glob(".tmp-*"))
    torch.distributed.barrier()
    write_module.write_safetensors = original
    saver.save(3, {})
    saver.wait()
    torch.distributed.barrier()
    assert steps_of(folder) == [3]
    if rank == 1:
        write_module.write_safetensors = full
    saver.save(4, {})
    with pytest.raises(CheckpointError, match=r"rank 1: .*No space left"):
        saver.close()  # the last one of a run must hold
    strict = CheckpointSaver(engine, folder, SaveSettings(on_error="stop", in_background=False))
    with pytest.raises(CheckpointError, match=r"shard-00001-of-00002.*No space left"):
        strict.save(5, {})


def test_a_failed_save_costs_a_checkpoint_and_not_the_run(tmp_path: Path) -> None:
    run_ranks(2, fail_on_one_rank, tmp_path, timeout_s=90)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place")
    run_ranks(1, save_into_a_file, tmp_path / "checkpoints", timeout_s=60)


def save_into_a_file(folder: Path) -> None:
    engine = build_engine(tiny_model())
    for in_background in (True, False):
        saver = CheckpointSaver(engine, folder, SaveSettings(in_background=in_background))
        saver.save(1, {})  # told, and the run goes on
        with pytest.raises(CheckpointError, match=f"Saving {folder}/step-00000001 failed"):
            saver.close()  # but it does not end as if the last step were saved
    with pytest.raises(CheckpointError, match=f"Saving {folder}/step-00000001 failed"):
        CheckpointSaver(engine, folder, SaveSettings(on_error="stop")).save(1, {})


def find_with_ranks(folder: Path) -> str | None:
    found = newest_checkpoint(folder)
    return None if found is None else found.name


def test_ranks_agree_on_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """Each file is read by one rank; damage seen by one of them counts for all."""
    for step in (1, 2, 3):
        save_plainly(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    shard = tmp_path / "step-00000002" / "shard-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert run_ranks(2, find_with_ranks, tmp_path) == ["step-00000001"] * 2
    assert run_ranks(3, find_with_ranks, tmp_path / "nowhere") == [None] * 3


def save_plainly(folder: Path, step: int, world_size: int = 2, timeout_s: float = 30.0) -> None:
    """Save the first state of `tests.train.crash` as some ranks would, one thread each."""
    state = first_state()
    final = folder / f"step-{step:08d}"
    temporary = folder / str(prepare(final))
    destination = Destination(temporary, final, None, None, Retention(9), timeout_s)
    threads = [
        threading.Thread(
            target=write_rank,
            args=(
                _snapshot({k: ((0, v.numel() * (1 - r)), v.reshape(-1)[: v.numel() * (1 - r)])
                           for k, v in state.items()}),
                _manifest(step, world_size),
                r,
                destination,
                threading.Event(),
            ),
        )
        for r in range(world_size)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_rank_that_never_answers_is_named(tmp_path: Path) -> None:
    final = tmp_path / "step-00000001"
    temporary = tmp_path / str(prepare(final))
    destination = Destination(temporary, final, None, None, Retention(9), timeout_s=0.3)
    state = {k: ((0, v.numel()), v.reshape(-1)) for k, v in first_state().items()}
    with pytest.raises(CheckpointError, match=r"nothing heard from the ranks \[1\] for 0 s"):
        write_rank(_snapshot(state), _manifest(1, 2), 0, destination, threading.Event())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_a_disk_that_is_really_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("this machine does not let its root mount a tmpfs")
    try:
        with caplog.at_level(logging.ERROR):
            run_ranks(1, fill_the_disk, disk, timeout_s=60)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill_the_disk(folder: Path) -> None:
    engine = build_engine(tiny_model())
    saver = CheckpointSaver(engine, folder, SaveSettings(keep_last=1))
    saver.save(1, {})  # 0.7 MB do not fit
    saver.wait()
    assert newest_valid(folder) is None and list(folder.iterdir()) == []
    (folder / "of-somebody-else").write_bytes(bytes(300_000))
    with pytest.raises(CheckpointError, match="No space left on device"):
        CheckpointSaver(engine, folder, SaveSettings(on_error="stop", in_background=False)).save(
            2, {}
        )
