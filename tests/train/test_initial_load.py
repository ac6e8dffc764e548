"""The weights that a stage starts from: every rank its slices, tied and untied, nothing guessed."""

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations import HfDeepSpeedConfig

from data_tools.errors import ConfigError
from tests.harness import FOUR_ZERO_SETTINGS, run_ranks
from tests.train.tiny import tiny_folder, tiny_model
from train.checkpoint import files
from train.initial_load import load_model
from train.modeling.names import hub_name

ATTENTION = {"text_config": "sdpa", "vision_config": "sdpa"}


def load_partitioned(folder: Path, dtype: str) -> tuple[int, dict[str, torch.Tensor], bool]:
    """Return (bytes of weights read, every whole weight, whether the head is the embedding)."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **FOUR_ZERO_SETTINGS},
        "bf16": {"enabled": dtype == "bf16"},
    }
    alive = HfDeepSpeedConfig(config)
    num_bytes = 0
    original = files.TensorFile.read_into

    def counting(self: Any, key: str, start: int, out: torch.Tensor) -> None:
        nonlocal num_bytes
        num_bytes += out.numel() * out.element_size()
        original(self, key, start, out)

    files.TensorFile.read_into = counting  # type: ignore[method-assign]
    model = load_model(str(folder), precision=dtype, attention=ATTENTION)
    files.TensorFile.read_into = original  # type: ignore[method-assign]
    del alive
    weights = {}
    for name, p in model.named_parameters():
        assert p.ds_tensor.numel() * torch.distributed.get_world_size() >= p.ds_numel
        with deepspeed.zero.GatheredParameters([p]):
            weights[name] = p.detach().clone()
    return num_bytes, weights, model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_rank_reads_its_slices_alone(tmp_path: Path, tied: bool, dtype: str) -> None:
    folder = tiny_folder(tmp_path, tied=tied)
    size = sum(t.numel() * 2 for t in load_file(folder / "model.safetensors").values())
    found = run_ranks(3, load_partitioned, folder, dtype, timeout_s=60)
    expected = dict(tiny_model(tied=tied).named_parameters())
    for num_bytes, weights, is_tied in found:
        assert num_bytes <= size / 3 + 2 * len(weights) and is_tied == tied
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            wanted = expected[name].detach().bfloat16().to(weight.dtype)
            assert torch.equal(weight, wanted), name
    assert sum(num_bytes for num_bytes, _, _ in found) == size


def test_a_whole_model_is_filled_as_well(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    model = load_model(str(folder), precision="fp32", attention=ATTENTION)
    stored = load_file(folder / "model.safetensors")
    for name, p in model.named_parameters():
        assert torch.equal(p, stored[hub_name(name)].float())
    assert not model.model.language_model.rotary_emb.inv_freq.is_meta


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    changed |= {"model.norm.weight": torch.zeros(5), "more.weight": torch.zeros(1)}
    save_file(changed, path)
    with pytest.raises(ConfigError) as refusal:
        load_model(str(folder), precision="fp32", attention=ATTENTION)
    message = str(refusal.value)
    assert "1 missing, as lm_head.weight" in message and "1 unknown, as more.weight" in message
    assert "1 of another shape, as model.language_model.norm.weight [5] instead of [32]" in message
    path.unlink()
    with pytest.raises(ConfigError, match=r"holds no \*.safetensors"):
        load_model(str(folder), precision="fp32", attention=ATTENTION)
