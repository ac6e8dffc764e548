"""Patches on the device, bit-equal to the image processor of the published model."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_tools.examples.encode import ImageSettings, grid_of
from data_tools.examples.images import decode
from tests.builders import draw_page
from train.modeling.pixels import PixelNormalizer, patchify

PUBLISHED = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
LIMITS: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 60_000}
# The torchvision of the benchmarks' own environment (make bench-env), beside a CPU build of torch.
TORCHVISION = Path(__file__).parents[2] / "build" / "bench-env"
HUB_FAST = """
import sys
import numpy as np, torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.append(sys.argv[1])
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
pages = np.load(sys.argv[2])
limits = {"min_pixels": int(sys.argv[3]), "max_pixels": int(sys.argv[4])}
processor = Qwen2VLImageProcessor(**limits, image_mean=[0.5] * 3, image_std=[0.27] * 3)
images = [torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in pages.values()]
found = processor(images, return_tensors="pt")
np.savez(sys.argv[5], **{name: found[name].numpy() for name in found})
"""


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


@pytest.mark.parametrize("max_pixels", [400_000, 12_845_056])
def test_real_receipts_equal_the_hub_from_the_file_on(max_pixels: int) -> None:
    folder = Path(os.environ.get("LECTERN_SHARED", "")) / "sroie" / "images"
    if not folder.is_dir():
        pytest.skip("LECTERN_SHARED does not name a folder with sroie/images")
    files = sorted(folder.iterdir())[:40:5]
    limits: Any = {"min_pixels": 3136, "max_pixels": max_pixels}
    processor = Qwen2VLImageProcessorPil(**limits, image_mean=[0.5] * 3, image_std=[0.27] * 3)
    for file in files:
        with Image.open(file) as image:
            expected = processor([image.convert("RGB")], return_tensors="pt")
        prepared = ImageSettings(**limits).prepare(decode(file.read_bytes()))
        grid = torch.from_numpy(grid_of((prepared,)))
        flat = torch.from_numpy(prepared.reshape(-1))
        patches = patchify(flat, grid, PixelNormalizer([0.5] * 3, [0.27] * 3))
        assert torch.equal(patches, expected["pixel_values"]), file.name


@pytest.mark.timeout(120)
def test_fast_patches_equal_the_hubs_torchvision_processor(tmp_path: Path) -> None:
    if not (TORCHVISION / "torchvision").is_dir():
        pytest.skip("no torchvision to compare with; make bench-env installs one")
    grey = np.broadcast_to(pages()[3][:, :, :1], pages()[3].shape)
    images = [*pages(), grey]
    np.savez(tmp_path / "pages.npz", *images)
    limits = [str(value) for value in LIMITS.values()]
    files = [str(tmp_path / "pages.npz"), *limits, str(tmp_path / "hub.npz")]
    subprocess.run([sys.executable, "-c", HUB_FAST, str(TORCHVISION), *files], check=True)
    expected = np.load(tmp_path / "hub.npz")

    prepared = tuple(ImageSettings(**LIMITS, mode="fast").prepare(page) for page in images)
    grid = torch.from_numpy(grid_of(prepared))
    flat = torch.from_numpy(np.concatenate([page.reshape(-1) for page in prepared]))
    assert np.array_equal(grid, expected["image_grid_thw"])
    patches = patchify(flat, grid, PixelNormalizer([0.5] * 3, [0.27] * 3))
    # It folds the rescaling into mean and deviation, which rounds otherwise (one unit).
    np.testing.assert_allclose(patches, expected["pixel_values"], rtol=0, atol=1e-6)
    levels = [np.rint((p * 0.27 + 0.5) * 255) for p in (patches.numpy(), expected["pixel_values"])]
    assert np.array_equal(*levels)


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
