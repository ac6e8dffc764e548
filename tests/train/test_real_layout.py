"""The published models' layout, weights as holes in sparse files: what an export would write."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from train.checkpoint.files import DTYPE_NAMES
from train.checkpoint.manifest import Manifest, Shard, write_manifest
from train.checkpoint.weights import Origin, TrainedWeights, file_names, plan_files

BF16_BYTES = {"7b": 16_584_333_312, "3b": 7_509_245_952}


@pytest.fixture
def published(request: pytest.FixtureRequest) -> Path:
    folder = os.environ.get("LECTERN_MODELS")
    if not folder:
        pytest.skip("LECTERN_MODELS does not name a folder with the models' small files")
    return Path(folder) / f"qwen2.5-vl-{request.param}"


def write_sparse_checkpoint(folder: Path, model: Any) -> None:
    """Write a checkpoint of every parameter in float32 that takes hardly any disk."""
    header: dict[str, Any] = {}
    table: dict[str, tuple[list[int], int, int]] = {}
    end = 0
    for name, p in model.named_parameters():
        start, end = end, end + 4 * p.numel()
        header[f"fp32|{name}"] = {
            "dtype": DTYPE_NAMES[torch.float32],
            "shape": [p.numel()],
            "data_offsets": [start, end],
        }
        table[f"fp32|{name}"] = (list(p.shape), 0, p.numel())
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "shard-00000-of-00001.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        size = file.seek(0, os.SEEK_END)
    parameters = {
        name: {"shape": list(p.shape), "trainable": True} for name, p in model.named_parameters()
    }
    shard = Shard("shard-00000-of-00001.safetensors", size, 0, table)
    write_manifest(folder, Manifest(1, 1, [shard], [], [], {}, {}, parameters))


@pytest.mark.parametrize(
    ("published", "size", "count", "is_tied"),
    [("7b", "7b", 729, False), ("3b", "3b", 824, True)],
    indirect=["published"],
)
def test_an_export_lists_exactly_the_hubs_names_and_shapes(
    published: Path, tmp_path: Path, size: str, count: int, is_tied: bool
) -> None:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(published))
    write_sparse_checkpoint(tmp_path / "step-00000001", model)
    weights = TrainedWeights(Origin((tmp_path / "step-00000001",), tied=is_tied))
    shapes = weights.shapes()
    index = json.loads((published / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(shapes) == set(index["weight_map"]) and len(shapes) == count
    assert ("lm_head.weight" in shapes) == (not is_tied)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    assert sum(sizes.values()) == BF16_BYTES[size]
    files = plan_files(sizes, 5 * 10**9)
    assert sum(len(names) for names in files) == count
    assert max(sum(sizes[n] for n in names) for names in files) <= 5 * 10**9
    assert file_names(files)[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert shapes["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    block = next(weights.blocks("model.embed_tokens.weight"))
    assert len(block) * 4 == 8 << 20 and not block.any()
