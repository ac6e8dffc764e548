"""Checkpoints: exact at every world size, whole or not there at all, damage found and named."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_tools.errors import CheckpointError
from tests.harness import RankError, run_ranks
from tests.train.checkpoint_files import write_checkpoint
from tests.train.engines import FROZEN, build_engine, extended_model, save, train, whole_state
from train.checkpoint import (
    SliceReader,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_valid,
    read_manifest,
    verify,
)
from train.checkpoint import write as write_module
from train.checkpoint.shards import partition

STATE = {"data": {"epoch": 2, "cursor": [3, 4]}, "lr": 0.1, "7": None}


@given(
    shapes=st.lists(
        st.sampled_from([(1,), (3,), (2, 3), (257,), (4, 1, 5), (7, 11)]), min_size=1, max_size=4
    ),
    written=st.integers(1, 5),
    read=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_slices_written_by_some_ranks_are_read_whole_by_others(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    written: int,
    read: int,
) -> None:
    tensors = {f"fp32|p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("slices"), tensors, written, 1)
    reader = SliceReader(checkpoint, read_manifest(checkpoint))
    assert verify(checkpoint) == []
    for key, tensor in tensors.items():
        ranges = [partition(tensor.numel(), read, rank) for rank in range(read)]
        parts = [reader.read(key, start, end) for start, end in ranges]
        assert torch.equal(torch.cat(parts).view(tensor.shape), tensor)
    shutil.rmtree(checkpoint.parent)


# --- damaged files ---------------------------------------------------------------------------


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    """A folder with whole checkpoints of step 1 and step 2, two shards each."""
    for step in (1, 2):
        write_checkpoint(tmp_path, {"fp32|a": torch.randn(5, 7), "fp32|b": torch.randn(1)}, 2, step)
    return tmp_path


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def change_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))


def spoil(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


SHARD = "shard-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (flip_byte, SHARD, "its CRC-32 differs"),
        (cut_off, SHARD, "bytes, expected"),
        (Path.unlink, SHARD, "is missing"),
        (Path.unlink, "manifest.json", "not a whole checkpoint"),
        (spoil, "manifest.json", "not a readable manifest"),
        (change_step, "manifest.json", "does not match its own digest"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(
    two_steps: Path, caplog: pytest.LogCaptureFixture, damage: Any, file: str, words: str
) -> None:
    damaged = two_steps / "step-00000002"
    damage(damaged / file)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(two_steps) == two_steps / "step-00000001"
    assert words in caplog.text and str(damaged / file) in caplog.text
    assert len(verify(damaged)) == 1
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(two_steps, 2)


def test_unfinished_folders_and_hints_are_ignored(two_steps: Path) -> None:
    (two_steps / "step-00000002").rename(two_steps / ".tmp-step-00000002-abc")
    (two_steps / "latest").write_text("step-00000002\n")
    assert [step for step, _ in list_checkpoints(two_steps)] == [1]
    assert newest_valid(two_steps) == two_steps / "step-00000001"


def test_a_missing_checkpoint_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="there is none"):
        find_checkpoint(tmp_path)
    for step in (1, 2):
        write_checkpoint(tmp_path, {"fp32|a": torch.zeros(1)}, 1, step)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: 1, 2"):
        find_checkpoint(tmp_path, 5)
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000002"
    assert find_checkpoint(tmp_path, 1) == tmp_path / "step-00000001"


# --- engines ---------------------------------------------------------------------------------


def fresh_engine(dtype: str, zero: dict[str, Any] | None = None, lr: float = 1e-2) -> Any:
    model = extended_model()
    model.get_parameter(FROZEN).requires_grad_(False)
    return build_engine(model, dtype, zero, lr)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    assert not differing, differing[:5]


def assert_settings_restored(engine: Any) -> None:
    groups = engine.optimizer.param_groups
    assert [(g["name"], g["lr"], g["weight_decay"], g["betas"]) for g in groups] == [
        ("vision", 1e-2, 0.1, (0.9, 0.999)),
        ("rest", 2e-3, 0.0, (0.9, 0.999)),
    ]
    optimizer = engine.optimizer.optimizer
    counts = [
        optimizer.state[flat]["step"] for flat in engine.optimizer.fp32_partitioned_groups_flat
    ]
    assert [int(count) for count in counts] == [3] * len(counts)
    assert len({count.data_ptr() for count in counts}) == len(counts), "a shared step count"
    assert engine.global_steps == 3


def save_and_continue(folder: Path) -> None:
    """Two ranks: save at 3, go on to 5; then load at 3 elsewhere, go on to 5: bitwise the same."""
    for dtype in ("fp32", "bf16"):
        engine = fresh_engine(dtype)
        losses = train(engine, 0, 3)
        assert losses[0] > 0
        saved = save(engine, folder / dtype, 3, STATE, keep_last=2)
        state = whole_state(engine)
        if torch.distributed.get_rank() == 0:
            save_file(state, folder / f"{dtype}.safetensors")
        random_numbers = torch.rand(4)
        losses = train(engine, 3, 2)
        end = whole_state(engine)

        again = fresh_engine(dtype, lr=0.5)
        torch.manual_seed(1234)
        assert load_checkpoint(again, saved) == STATE
        assert torch.equal(torch.rand(4), random_numbers)
        assert_same(whole_state(again), state)
        assert_settings_restored(again)
        assert train(again, 3, 2) == losses
        assert_same(whole_state(again), end)


def load_elsewhere(folder: Path) -> None:
    """Any number of ranks: fp32 partitioned, bf16 kept whole and with more sub-groups."""
    for dtype in ("fp32", "bf16"):
        state = load_file(folder / f"{dtype}.safetensors")
        zero = {"sub_group_size": 5000} if dtype == "bf16" else None
        engine = fresh_engine(dtype, zero, lr=0.5)
        if zero is not None:
            train(engine, 8, 1)  # DeepSpeed now keeps small parameters whole
        load_checkpoint(engine, folder / dtype / "step-00000003")
        assert_same(whole_state(engine), state)
        assert_settings_restored(engine)
        train(engine, 3, 1)


def refuse(folder: Path) -> None:
    """Two ranks: every refusal reaches both, none of them waits."""
    engine = fresh_engine("fp32")
    # before the first step there are no moments yet
    assert save(engine, folder / "early", 0, {}, keep_last=1).name == "step-00000000"
    rank = torch.distributed.get_rank()

    def full_disk(path: Path, *_: Any) -> int:
        raise OSError(28, "No space left on device")

    original = write_module.write_safetensors
    if rank == 1:
        write_module.write_safetensors = full_disk  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"rank 1: .*shard-00001-of-00002.*No space left"):
        save(engine, folder / "full", 1, {}, keep_last=1)
    write_module.write_safetensors = original
    torch.distributed.barrier()
    assert list((folder / "full").iterdir()) == []
    torch.distributed.barrier()

    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(engine, folder / "full", 1, {"bad": {1, 2}}, keep_last=1)

    train(engine, 0, 1)
    for step in (1, 2, 3):
        path = save(engine, folder / "kept", step, {"n": step}, keep_last=2)
    torch.distributed.barrier()
    names = sorted(p.name for p in (folder / "kept").iterdir())
    assert names == ["latest", "step-00000002", "step-00000003"]
    before = (path / "manifest.json").read_bytes()
    assert save(engine, folder / "kept", 3, {"n": -1}, keep_last=2) == path
    assert (path / "manifest.json").read_bytes() == before

    torch.distributed.barrier()
    if rank == 0:
        flip_byte(path / SHARD)
    torch.distributed.barrier()
    with pytest.raises(CheckpointError, match=r"rank 1: .*its CRC-32 differs"):
        load_checkpoint(engine, path)
    # a damaged one of the same step is replaced
    save(engine, folder / "kept", 3, {"n": 4}, keep_last=2)
    assert load_checkpoint(engine, path) == {"n": 4}


def refuse_other_models(folder: Path) -> None:
    """One rank: a checkpoint of another model, stage or optimizer is refused by name."""
    path = folder / "fp32" / "step-00000003"
    model = extended_model()
    with pytest.raises(CheckpointError, match=f"{FROZEN} was frozen, here it is trained"):
        load_checkpoint(build_engine(model), path)
    model = extended_model()
    model.get_parameter(FROZEN).requires_grad_(False)
    model.extra = torch.nn.Linear(1, 4, bias=True)
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(build_engine(model), path)
    assert "extra.bias is not in the checkpoint" in str(refusal.value)
    assert "extra.weight has shape [3, 1], this model [4, 1]" in str(refusal.value)
    model = extended_model()
    model.get_parameter(FROZEN).requires_grad_(False)
    engine = build_engine(model)
    engine.optimizer.param_groups[1]["name"] = "language_model"
    with pytest.raises(CheckpointError, match="parameter groups"):
        load_checkpoint(engine, path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by two ranks, fp32 and bf16, with the whole state beside them."""
    folder = tmp_path_factory.mktemp("written")
    run_ranks(2, save_and_continue, folder, timeout_s=90)
    return folder


def test_resume_at_the_same_world_size_is_bitwise_the_uninterrupted_run(written: Path) -> None:
    manifest = read_manifest(written / "bf16" / "step-00000003")
    assert manifest.state == STATE and manifest.world_size == 2
    assert not manifest.parameters[FROZEN]["trainable"]
    assert not any(FROZEN in key for shard in manifest.shards for key in shard.table)
    body = json.loads((written / "bf16" / "step-00000003" / "manifest.json").read_text())
    assert body["version"] == 1


def test_resume_of_a_single_rank_is_bitwise(tmp_path: Path) -> None:
    run_ranks(1, save_and_continue, tmp_path, timeout_s=60)


@pytest.mark.parametrize("world_size", [1, 3])
def test_state_is_bitwise_equal_at_another_world_size(written: Path, world_size: int) -> None:
    run_ranks(world_size, load_elsewhere, written, timeout_s=90)


def test_failures_reach_all_ranks_and_leave_nothing_behind(tmp_path: Path) -> None:
    run_ranks(2, refuse, tmp_path, timeout_s=90)


def test_a_checkpoint_of_another_model_is_refused_by_name(written: Path) -> None:
    run_ranks(1, refuse_other_models, written, timeout_s=60)


# --- the harness itself ----------------------------------------------------------------------


def hang_on_one_rank() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("only here")
    torch.distributed.barrier()


def sleep_forever() -> None:
    import time

    time.sleep(600)


def test_a_failing_rank_ends_the_others_and_is_quoted() -> None:
    with pytest.raises(RankError, match="ValueError: only here"):
        run_ranks(2, hang_on_one_rank, timeout_s=30)


def test_a_hang_is_a_failure_with_a_stack() -> None:
    with pytest.raises(RankError, match=r"(?s)not ended .*sleep_forever"):
        run_ranks(1, sleep_forever, timeout_s=2.5)
