"""Patches on the device, bit-equal to the image processor of the published model."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_tools.examples.encode import ImageSettings, grid_of
from tests.builders import draw_page
from train.modeling.pixels import PixelNormalizer, patchify

PUBLISHED = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
LIMITS: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 60_000}


def pages() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = [(100, 140), (28, 28), (333, 77), (500, 600), (9, 300)]
    made = [draw.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in shapes]
    return [*made, draw_page(300, 200, ["TOTAL 12.50", "发票"])]


def reference(images: list[np.ndarray], mean: list[float], std: list[float]) -> Any:
    processor = Qwen2VLImageProcessorPil(**LIMITS, image_mean=mean, image_std=std)
    return processor(images, return_tensors="pt")


@pytest.mark.parametrize("mean, std", [PUBLISHED, ([0.5] * 3, [0.27] * 3)])
def test_patches_equal_the_hub_bit_for_bit(mean: list[float], std: list[float]) -> None:
    expected = reference(pages(), mean, std)
    prepared = tuple(ImageSettings(**LIMITS).prepare(page) for page in pages())
    grid = torch.from_numpy(grid_of(prepared))
    flat = torch.from_numpy(np.concatenate([page.reshape(-1) for page in prepared]))
    assert torch.equal(grid, expected["image_grid_thw"])
    patches = patchify(flat, grid, PixelNormalizer(mean, std))
    assert patches.dtype == torch.float32
    assert torch.equal(patches, expected["pixel_values"])


def test_every_level_of_every_channel_equals_the_hub() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    page = np.zeros((56, 56, 3), np.uint8)
    for channel in range(3):
        page[:16, 16 * channel : 16 * channel + 16, channel] = levels
    expected = reference([page], *PUBLISHED)["pixel_values"]
    found = patchify(
        torch.from_numpy(page.reshape(-1)), torch.tensor([[1, 4, 4]]), PixelNormalizer(*PUBLISHED)
    )
    assert torch.equal(found, expected)


def test_normaliser_is_no_part_of_the_weights() -> None:
    assert not PixelNormalizer(*PUBLISHED).state_dict()
