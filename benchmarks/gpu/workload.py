"""The model and the documents of the GPU check: random weights, synthetic pixels, fixed sizes.

The eight documents are those of the published figures: two A4 pages, two receipts, two forms and
two line crops, as (patch rows, patch columns, answer tokens). Throughput depends on this mix, so
figures are comparable only between runs of it.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.examples.encode import Example
from data_tools.stream.collate import Batch, collate
from train.modeling.attention import choose_attention
from train.modeling.build import build_random_model
from train.modeling.flops import Workload, workload
from train.modeling.names import is_vision
from train.modeling.packed import PackedModel, layout_of
from train.modeling.pixels import PixelNormalizer
from train.modeling.tiny import tiny_config

DOCUMENTS = (
    (106, 76, 1400),  # A4, dense
    (106, 76, 520),  # A4, letter
    (128, 64, 260),  # receipt, long
    (92, 42, 220),  # receipt, short
    (100, 72, 350),  # form
    (50, 72, 180),  # form, half a page
    (4, 86, 24),  # line crop
    (4, 58, 16),  # line crop
)
TINY_DOCUMENTS = ((12, 10, 9), (8, 4, 5), (2, 14, 2), (4, 4, 3))
PROMPT_TOKENS = 25  # system, user header, vision start and end, question, assistant header
PATCH_PX = 14
FIRST_SPECIAL = 32_000  # ids of the mid-size vocabulary from here on are special


def make_model(device: torch.device, *, tiny: bool) -> PackedModel:
    """Return a packed model with random weights: 0.45 B parameters in bf16, or tiny in float32."""
    config = tiny_config(hidden=64, layers=2) if tiny else _mid_size_config()
    precision = "fp32" if device.type == "cpu" else "bf16"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        model = build_random_model(
            folder,
            precision=precision,
            attention=choose_attention("auto", device.type, precision),
            seed=0,
        )
    normalizer = PixelNormalizer([0.5, 0.5, 0.5], [0.27, 0.27, 0.27])
    return PackedModel(model, normalizer).to(device).train()


def set_stage(model: PackedModel, stage: int) -> list[torch.nn.Parameter]:
    """Freeze what a stage freezes and return what it trains (1: vision and merger; 2: all)."""
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(stage == 2 or is_vision(name))
        parameter.grad = None
    return [parameter for parameter in model.model.parameters() if parameter.requires_grad]


def make_batch(model: PackedModel, *, tiny: bool, numbers: Sequence[int] | None = None) -> Batch:
    """Return the fixed documents (all, or those of the given numbers) as one batch on the CPU."""
    config = model.model.config
    documents = TINY_DOCUMENTS if tiny else DOCUMENTS
    num_text_ids = 256 if tiny else FIRST_SPECIAL
    examples = [
        _example(number, documents[number], config.image_token_id, num_text_ids)
        for number in (range(len(documents)) if numbers is None else numbers)
    ]
    return collate(examples, layout_of(config))


def work_of(batch: Batch) -> Workload:
    """Return what the FLOPs of a batch (on the CPU) depend on."""
    grids = batch.grid_thw.tolist()
    return workload(batch.cu_seqlens.diff().tolist(), grids, len(batch.targets))


def _example(
    number: int, document: tuple[int, int, int], image_id: int, num_text_ids: int
) -> Example:
    rows, columns, num_answer = document
    generator = np.random.default_rng(number)
    size = (rows * PATCH_PX, columns * PATCH_PX, 3)
    pads = np.full(rows * columns // 4, image_id, np.int64)
    text = generator.integers(0, num_text_ids, PROMPT_TOKENS + num_answer)
    ids = np.concatenate([text[:PROMPT_TOKENS], pads, text[PROMPT_TOKENS:]])
    return Example(
        key=f"document-{number}",
        input_ids=ids,
        images=(generator.integers(0, 256, size, dtype=np.uint8),),
        target_positions=np.arange(len(ids) - num_answer, len(ids)),
        weights=np.ones(num_answer, np.float32),
    )


def _mid_size_config() -> dict[str, Any]:
    """Return a config with the head sizes of 7B (128 and 80) and about 0.45 B parameters."""
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 20,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 32_768,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "bos_token_id": FIRST_SPECIAL,
        "eos_token_id": FIRST_SPECIAL + 1,
        "pad_token_id": FIRST_SPECIAL,
        "vision_start_token_id": FIRST_SPECIAL + 2,
        "vision_end_token_id": FIRST_SPECIAL + 3,
        "image_token_id": FIRST_SPECIAL + 4,
        "video_token_id": FIRST_SPECIAL + 5,
        "vision_config": {
            "depth": 16,
            "hidden_size": 640,
            "intermediate_size": 1720,
            "num_heads": 8,
            "out_hidden_size": 1024,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [3, 7, 11, 15],
        },
    }
