"""Pack -> Batch: positions, windows and types as the model wants them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from data_tools.examples.encode import Encoder, Example
from data_tools.examples.tasks import Span, Turn
from data_tools.stream.collate import Batch, ModelLayout, collate
from tests.train.tiny import tiny_config
from train.modeling.tiny import ENDOFTEXT, IMAGE_PAD

LAYOUT = ModelLayout(IMAGE_PAD, ENDOFTEXT, window_px=112)
# (height, width) px of each image of each document
DOCUMENTS: list[list[tuple[int, int]]] = [
    [(56, 112)],
    [],
    [(28, 252), (168, 56), (280, 280)],
    [(140, 28)],
    [],
]


@pytest.fixture(scope="module")
def examples(byte_encoder: Encoder) -> list[Example]:
    draw = np.random.default_rng(0)
    made = []
    for number, shapes in enumerate(DOCUMENTS):
        images = tuple(draw.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in shapes)
        turns = (
            Turn("user", (Span("read this " * number),), len(images)),
            Turn("assistant", (Span("an answer " * (number + 1)),)),
        )
        made.append(byte_encoder.example(f"doc-{number}", turns, images))
    return made


def hub_positions(example: Example) -> torch.Tensor:
    """Return the (3, S) mrope positions that transformers gives a document alone."""
    model: Any = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
    torch.nn.Module.__init__(model)
    model.config = tiny_config()
    ids = torch.from_numpy(example.input_ids)[None]
    grid = torch.from_numpy(example.grid_thw) if example.images else None
    positions, _ = model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == IMAGE_PAD).int(),
        image_grid_thw=grid,
        attention_mask=torch.ones_like(ids),
    )
    return positions[:, 0]


def documents_of(batch: Batch) -> list[slice]:
    borders = batch.cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(borders[:-1], borders[1:], strict=True)]


def test_positions_equal_the_hubs_for_every_document(examples: list[Example]) -> None:
    batch = collate(examples, LAYOUT)
    for example, place in zip(examples, documents_of(batch), strict=True):
        positions = batch.position_ids[:, 0, place]
        assert torch.equal(positions[0], torch.arange(len(example.input_ids)))
        assert torch.equal(positions[1:], hub_positions(example))
        assert batch.input_ids[0, place].tolist() == example.input_ids.tolist()


def test_targets_are_predicted_from_the_token_before(examples: list[Example]) -> None:
    batch = collate(examples, LAYOUT)
    expected = np.concatenate([e.input_ids[e.target_positions] for e in examples])
    assert batch.targets.tolist() == expected.tolist()
    assert torch.equal(batch.input_ids[0, batch.target_index + 1], batch.targets)
    owners = torch.searchsorted(batch.cu_seqlens, batch.target_index.int(), right=True)
    assert torch.equal(
        owners, torch.searchsorted(batch.cu_seqlens, batch.target_index.int() + 1, right=True)
    )


def test_vision_borders_and_windows_are_consistent(examples: list[Example]) -> None:
    batch = collate(examples, LAYOUT)
    shapes = [shape for document in DOCUMENTS for shape in document]
    patches = [height * width // 14**2 for height, width in shapes]
    assert batch.grid_thw.tolist() == [[1, h // 14, w // 14] for h, w in shapes]
    assert batch.vision_cu_seqlens.tolist() == np.cumsum([0, *patches]).tolist()
    assert batch.vision_max_seqlen == max(patches)
    assert batch.vision_window_index.sort().values.tolist() == list(range(sum(patches) // 4))
    windows = batch.vision_cu_window_seqlens
    assert windows[0] == 0 and windows[-1] == sum(patches) and (windows.diff() > 0).all()
    assert batch.vision_max_window_seqlen == int(windows.diff().max()) <= (112 // 14) ** 2
    assert set(batch.vision_cu_seqlens.tolist()) <= set(windows.tolist()), "a window spans images"
    # Rows and columns count inside each image, in 2x2 blocks.
    first = batch.vision_position_ids[: patches[0]].tolist()
    assert first[:6] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert batch.vision_position_ids.max() == max(max(h, w) // 14 - 1 for h, w in shapes)


def test_pixels_are_the_images_one_after_the_other(examples: list[Example]) -> None:
    batch = collate(examples, LAYOUT)
    expected = np.concatenate([image.reshape(-1) for e in examples for image in e.images])
    assert np.array_equal(batch.pixels.numpy(), expected)
    assert batch.num_dummy_images == 0


def assert_contract(batch: Batch, num_documents: int) -> None:
    """Types and shapes as DESIGN.md has them under Batch."""
    tokens, images = batch.input_ids.shape[1], len(batch.grid_thw)
    patches = int(batch.grid_thw.prod(dim=1).sum())
    labels = len(batch.targets)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "input_ids": (torch.int64, (1, tokens)),
        "position_ids": (torch.int64, (4, 1, tokens)),
        "cu_seqlens": (torch.int32, (num_documents + 1,)),
        "pixels": (torch.uint8, (patches * 14 * 14 * 3,)),
        "grid_thw": (torch.int64, (images, 3)),
        "vision_cu_seqlens": (torch.int32, (images + 1,)),
        "vision_cu_window_seqlens": (torch.int32, tuple(batch.vision_cu_window_seqlens.shape)),
        "image_index": (torch.int64, (0 if batch.num_dummy_images else patches // 4,)),
        "vision_window_index": (torch.int64, (patches // 4,)),
        "vision_position_ids": (torch.int64, (patches, 2)),
        "targets": (torch.int64, (labels,)),
        "target_index": (torch.int64, (labels,)),
        "weights": (torch.float32, (labels,)),
    }
    values = vars(batch)
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == expected
    assert images >= 1 and labels >= 1 and tokens >= 2
    for name in ("max_seqlen", "vision_max_seqlen", "vision_max_window_seqlen", "num_dummy_images"):
        assert type(values[name]) is int
    assert type(batch.weight_sum) is float
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == tokens


@pytest.mark.parametrize("chosen", [[0], [1], [1, 4], [0, 1, 2, 3, 4], [2, 3], []])
def test_contract(examples: list[Example], chosen: list[int]) -> None:
    pack = [examples[i] for i in chosen]
    batch = collate(pack, LAYOUT, token_budget=5000)
    assert_contract(batch, max(1, len(pack)))
    assert batch.keys == tuple(example.key for example in pack)
    assert batch.num_tokens == sum(len(e.input_ids) for e in pack)
    assert batch.num_pad_tokens == 5000 - batch.num_tokens
    assert batch.weight_sum == float(sum(e.weights.sum(dtype=np.float64) for e in pack))


@pytest.mark.parametrize("chosen", [[1], [1, 4], []])
def test_packs_without_images_get_a_dummy_image(examples: list[Example], chosen: list[int]) -> None:
    batch = collate([examples[i] for i in chosen], LAYOUT)
    assert batch.num_dummy_images == 1 and batch.grid_thw.tolist() == [[1, 4, 4]]
    assert not (batch.input_ids == IMAGE_PAD).any()


def test_an_empty_pack_weighs_nothing() -> None:
    batch = collate([], LAYOUT, holes=({"key": "k", "reason": "r"},))
    assert batch.weight_sum == 0.0 and batch.weights.tolist() == [0.0]
    assert batch.target_index.tolist() == [0] and batch.keys == () and batch.num_tokens == 0
    assert batch.holes == ({"key": "k", "reason": "r"},)


def test_a_pack_without_labels_gets_a_target_of_weight_0(examples: list[Example]) -> None:
    nothing = np.zeros(0, np.int64)
    bare = dataclasses.replace(
        examples[0], target_positions=nothing, weights=nothing.astype(np.float32)
    )
    batch = collate([bare], LAYOUT)
    assert_contract(batch, 1)
    assert batch.weight_sum == 0.0


def test_the_weight_sum_is_added_up_in_float64() -> None:
    weights = np.full(100_000, 0.1, np.float32)
    example = Example("k", np.zeros(100_001, np.int64), (), np.arange(1, 100_001), weights)
    assert collate([example], LAYOUT).weight_sum == float(weights.astype(np.float64).sum())


def test_moving_keeps_everything_and_the_grid_on_the_host(examples: list[Example]) -> None:
    batch = collate(examples, LAYOUT)
    moved = batch.to("meta")
    assert moved.grid_thw is batch.grid_thw and moved.keys == batch.keys
    devices = {n: v.device.type for n, v in vars(moved).items() if isinstance(v, torch.Tensor)}
    assert devices.pop("grid_thw") == "cpu" and set(devices.values()) == {"meta"}
