"""Names in memory and on the hub map one to one, for the real models too."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from tests.train.tiny import tiny_model
from train.modeling.names import (
    hub_name,
    is_adapter,
    is_merger,
    is_vision,
    memory_name,
    module_group,
    plain_name,
)


def models_folder() -> Path:
    """Return the folder of the real models' small files; skip the test without it."""
    folder = os.environ.get("LECTERN_MODELS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LECTERN_MODELS does not name a folder with the models' small files")
    return Path(folder)


@pytest.mark.parametrize(
    ("memory", "hub"),
    [
        ("model.visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight"),
        ("model.visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_translate_both_ways(memory: str, hub: str) -> None:
    assert hub_name(memory) == hub
    assert memory_name(hub) == memory
    assert memory_name(memory) == memory


def test_every_parameter_belongs_to_one_part_of_the_model() -> None:
    groups: dict[str, int] = {}
    for name, parameter in tiny_model().named_parameters():
        group = module_group(name)
        groups[group] = groups.get(group, 0) + parameter.numel()
        assert is_vision(name) == (group in ("vision", "merger"))
        assert is_merger(name) == (group == "merger")
    assert set(groups) == {"vision", "merger", "language_model", "lm_head"}


def test_a_foreign_name_is_refused() -> None:
    with pytest.raises(ValueError, match="not a parameter of Qwen2.5-VL"):
        module_group("encoder.weight")


def test_adapter_names_are_told_apart() -> None:
    stem = "model.language_model.layers.0.self_attn.q_proj"
    assert is_adapter(f"{stem}.lora_A.default.weight")
    assert not is_adapter(f"{stem}.base_layer.weight")
    assert plain_name(f"{stem}.base_layer.weight") == f"{stem}.weight"


@pytest.mark.parametrize(("size", "count"), [("7b", 729), ("3b", 824)])
def test_names_of_the_real_models_are_those_of_their_index(size: str, count: int) -> None:
    folder = models_folder() / f"qwen2.5-vl-{size}"
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = [name for name, _ in model.named_parameters()]
    assert {hub_name(name) for name in names} == set(index)
    assert [memory_name(hub_name(name)) for name in names] == names
    assert len(names) == count
