"""From resized uint8 images to the vision encoder's patches, on the device, bit-equal to the hub's.

Workers ship each page once as uint8 (an eighth of the bytes of the processor's float output);
patch order, normalisation and the temporal copy happen here.
"""

import numpy as np
import torch
from torch import Tensor, nn

CHANNELS, PATCH, MERGE, FRAMES = 3, 14, 2, 2


class PixelNormalizer(nn.Module):
    """Normalise uint8 pixels by a 256 x 3 table, as `Qwen2VLImageProcessorPil` computes them.

    The processor rescales in float64, then normalises in float32; a table of its 768 results is
    exact, computing in float32 all through is not.
    """

    table: Tensor

    def __init__(self, image_mean: list[float], image_std: list[float]) -> None:
        super().__init__()
        levels = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
        mean, std = np.asarray(image_mean, np.float32), np.asarray(image_std, np.float32)
        table = torch.from_numpy((levels - mean) / std)  # (256, 3)
        self.register_buffer("table", table.T.reshape(-1).contiguous(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, 14, 14) uint8 to the same shape in float32."""
        offset = torch.arange(0, 768, 256, device=pixels.device, dtype=torch.int32)
        return self.table[pixels.to(torch.int32) + offset[:, None, None]]


def patchify(pixels: Tensor, grid_thw: Tensor, normalizer: PixelNormalizer) -> Tensor:
    """Cut images into normalised patches in the order of the Qwen2-VL image processor.

    Args:
        pixels: flat uint8, the (H, W, 3) images one after the other.
        grid_thw: (I, 3) int64 on the CPU; (1, H / 14, W / 14) an image.
        normalizer: on the device of `pixels`.

    Returns:
        (P, 1176) float32: rows in 2x2-merge order, columns (channel, frame, 14, 14).
    """
    rows, start = [], 0
    for _, grid_h, grid_w in grid_thw.tolist():
        size = grid_h * grid_w * PATCH * PATCH * CHANNELS
        image = pixels[start : start + size]
        start += size
        image = image.view(grid_h // MERGE, MERGE, PATCH, grid_w // MERGE, MERGE, PATCH, CHANNELS)
        # (block row, dy, py, block column, dx, px, channel) -> (blocks, dy, dx, channel, py, px)
        rows.append(image.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, CHANNELS, PATCH, PATCH))
    patches = normalizer(torch.cat(rows))
    frames = patches[:, :, None].expand(-1, -1, FRAMES, -1, -1)
    return frames.reshape(-1, CHANNELS * FRAMES * PATCH * PATCH)
