"""Pack -> Batch: all position and window arithmetic, done in the worker.

Everything that forward and backward need to know is in the Batch as a tensor or a Python number, so
that nothing on the device has to be asked. Shapes: T tokens, D documents, I images, P patches,
L label tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

from data_tools.examples.encode import Example
from data_tools.examples.images import PATCH_PX

MERGE = 2
DUMMY_PX = 56
ON_HOST = ("grid_thw",)


@dataclass(frozen=True)
class ModelLayout:
    """What collating must know of a model."""

    image_pad_id: int
    pad_id: int
    window_px: int


@dataclass(frozen=True)
class Batch:
    """One micro-step of one rank.

    Attributes:
        input_ids: (1, T) int64.
        position_ids: (4, 1, T) int64; row 0 restarts at 0 per document, rows 1-3 are mrope t, h, w.
        cu_seqlens: (D + 1,) int32, borders of the documents.
        max_seqlen: longest document.
        pixels: flat uint8, the resized (H, W, 3) images one after the other.
        grid_thw: (I, 3) int64, stays on the CPU.
        num_dummy_images: 1 if the only image is the dummy of a pack without images, else 0.
        vision_cu_seqlens: (I + 1,) int32, borders of the images in patches.
        vision_max_seqlen: patches of the largest image.
        vision_cu_window_seqlens: (windows + 1,) int32.
        vision_max_window_seqlen: patches of the largest window.
        vision_window_index: (P / 4,) int64.
        vision_position_ids: (P, 2) int64.
        image_index: (P / 4,) int64, the places of the image features in the row; empty for a dummy.
        targets: (L,) int64 ids to be predicted.
        target_index: (L,) int64, where they are predicted: label position - 1.
        weights: (L,) float32.
        weight_sum: sum of the weights, float64 on the host.
        keys: of the documents.
        holes: samples of the plan that could not be used, each a record for the fault report.
        num_pad_tokens: tokens of the budget that stay empty.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    pixels: Tensor
    grid_thw: Tensor
    num_dummy_images: int
    vision_cu_seqlens: Tensor
    vision_max_seqlen: int
    vision_cu_window_seqlens: Tensor
    vision_max_window_seqlen: int
    vision_window_index: Tensor
    vision_position_ids: Tensor
    image_index: Tensor
    targets: Tensor
    target_index: Tensor
    weights: Tensor
    weight_sum: float
    keys: tuple[str, ...]
    holes: tuple[dict[str, Any], ...] = ()
    num_pad_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents, text and visual."""
        return int(self.input_ids.shape[1]) if self.keys else 0

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on a device; the grid stays on the CPU."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor) and name not in ON_HOST:
                values[name] = value.to(device, non_blocking=True)
        return Batch(**values)

    def pin(self) -> "Batch":
        """Return the batch in pinned memory, from which copies to a GPU run alongside."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor) and name not in ON_HOST:
                values[name] = value.pin_memory()
        return Batch(**values)


def collate(
    examples: list[Example],
    layout: ModelLayout,
    *,
    token_budget: int = 0,
    holes: tuple[dict[str, Any], ...] = (),
) -> Batch:
    """Join examples into one row of documents that do not see each other.

    A pack without images gets a 56x56 dummy, one without labels a target of weight 0: every rank
    runs the same modules in every micro-step, forward and backward, or ZeRO-3 waits forever.
    """
    keys = tuple(example.key for example in examples)
    documents = examples or [_filler(layout)]
    lengths = [len(example.input_ids) for example in documents]
    starts = np.cumsum([0, *lengths])
    images = [image for example in documents for image in example.images]
    is_dummy = not images
    if is_dummy:
        images = [np.zeros((DUMMY_PX, DUMMY_PX, 3), np.uint8)]
    grid = torch.tensor([[1, i.shape[0] // PATCH_PX, i.shape[1] // PATCH_PX] for i in images])
    window_index, cu_windows = get_vision_window_index(grid, MERGE, layout.window_px, PATCH_PX)
    cu_images = get_vision_cu_seqlens(grid)

    input_ids = np.concatenate([example.input_ids for example in documents])
    positions = np.concatenate([_positions(e, layout.image_pad_id) for e in documents], axis=1)
    labels = np.concatenate(
        [e.target_positions + start for e, start in zip(documents, starts, strict=False)]
    )
    weights = np.concatenate([example.weights for example in documents]).astype(np.float32)
    if not len(labels):
        labels, weights = np.asarray([1]), np.zeros(1, np.float32)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(positions)[:, None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_seqlen=max(lengths),
        pixels=torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])),
        grid_thw=grid,
        num_dummy_images=int(is_dummy),
        vision_cu_seqlens=cu_images,
        vision_max_seqlen=int(cu_images.diff().max()),
        vision_cu_window_seqlens=cu_windows,
        vision_max_window_seqlen=int(cu_windows.diff().max()),
        vision_window_index=window_index,
        vision_position_ids=get_vision_position_ids(grid, MERGE),
        image_index=torch.from_numpy(np.flatnonzero(input_ids == layout.image_pad_id)),
        targets=torch.from_numpy(input_ids[labels]),
        target_index=torch.from_numpy(labels - 1),
        weights=torch.from_numpy(weights),
        weight_sum=float(weights.sum(dtype=np.float64)),
        keys=keys,
        holes=holes,
        num_pad_tokens=max(0, token_budget - (int(starts[-1]) if keys else 0)),
    )


def _filler(layout: ModelLayout) -> Example:
    """Return the two tokens of weight 0 that an empty pack runs the model on."""
    ids = np.full(2, layout.pad_id, np.int64)
    return Example("", ids, (), np.asarray([1]), np.zeros(1, np.float32))


def _positions(example: Example, image_pad_id: int) -> np.ndarray:
    """Return (4, S) positions of one document: plain text row, then mrope t, h, w.

    The mrope rows equal `get_rope_index` of transformers: an image starts at the position s after
    its predecessor, (t, h, w) = (s, s + row, s + column); what follows starts at s + max(rows,
    columns).
    """
    is_pad = example.input_ids == image_pad_id
    size = len(is_pad)
    positions = np.empty((4, size), np.int64)
    positions[0] = np.arange(size)
    place, shift = 0, 0  # token index; how far mrope lags behind the token index
    for _, grid_h, grid_w in example.grid_thw:
        rows, columns = grid_h // MERGE, grid_w // MERGE
        first = place + int(np.argmax(is_pad[place:]))
        positions[1:, place:first] = np.arange(place, first) + shift
        start, end = first + shift, first + rows * columns
        positions[1, first:end] = start
        positions[2, first:end] = start + np.repeat(np.arange(rows), columns)
        positions[3, first:end] = start + np.tile(np.arange(columns), rows)
        shift += max(rows, columns) - rows * columns
        place = end
    positions[1:, place:] = np.arange(place, size) + shift
    return positions
