"""Floating-point operations of a training step of Qwen2.5-VL in closed form, and MFU from them.

Multiply and add are counted apart. Model FLOPs are those the mathematics needs: no padding, no
recomputation, logits only where there is a label, causal attention at half of the dense pairs.
`tests/train/test_flops.py` holds the formulas against counted operations of the real module.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PATCH_VALUES = 3 * 2 * 14 * 14  # channels x frames x height x width: inputs of the patch embedding
MERGE = 4  # patches of one visual token

# Dense bf16 with float32 accumulation, TFLOP/s, from the makers' data sheets (sparsity excluded).
_PEAK_TFLOPS = (
    (re.compile(r"\bH[12]00 NVL\b"), 835.0),
    (re.compile(r"\bH100 PCIe\b"), 756.0),
    (re.compile(r"\bH100\b"), 989.0),
    (re.compile(r"\bH200\b"), 989.0),
    (re.compile(r"\bA100\b"), 312.0),
    (re.compile(r"\bL40S\b"), 362.0),
    (re.compile(r"\bRTX 4090\b"), 165.0),
)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that FLOPs depend on."""

    hidden: int
    intermediate: int
    layers: int
    kv_width: int
    vocab: int
    vision_hidden: int
    vision_intermediate: int
    vision_depth: int
    vision_full_layers: int
    window_patches: int

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """Read the sizes from a `Qwen2_5_VLConfig`."""
        text, vision = config.text_config, config.vision_config
        head_dim = text.hidden_size // text.num_attention_heads
        return cls(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            kv_width=text.num_key_value_heads * head_dim,
            vocab=text.vocab_size,
            vision_hidden=vision.hidden_size,
            vision_intermediate=vision.intermediate_size,
            vision_depth=vision.depth,
            vision_full_layers=len(vision.fullatt_block_indexes),
            window_patches=vision.window_size // vision.patch_size,
        )


@dataclass(frozen=True)
class Workload:
    """What a step computes on.

    Attributes:
        lengths: tokens of each document, visual ones included.
        grids: (frames, patch rows, patch columns) of each image.
        num_labels: label tokens, the rows that need logits.
    """

    lengths: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...]
    num_labels: int


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward by part of the model; `patch` is included in `vision`."""

    patch: float
    vision: float
    merger: float
    lm: float
    lm_attention: float
    head: float

    @property
    def total(self) -> float:
        """FLOPs of the whole forward."""
        return self.vision + self.merger + self.lm + self.lm_attention + self.head


def window_lengths(grid: tuple[int, int, int], window_patches: int = 8) -> list[int]:
    """Return the patches of each attention window of one image, in raster order of the windows."""
    frames, rows, columns = grid
    heights = [min(window_patches, rows - y) for y in range(0, rows, window_patches)]
    widths = [min(window_patches, columns - x) for x in range(0, columns, window_patches)]
    return [height * width for height in heights for width in widths] * frames


def forward_flops(shape: ModelShape, work: Workload, *, causal: bool = True) -> ForwardFlops:
    """Return the FLOPs of one forward.

    Args:
        shape: of the model.
        work: documents and images.
        causal: count the pairs that a causal mask leaves; False counts all, as dense kernels and
            torch's own counter do.
    """
    d, h = shape.vision_hidden, shape.hidden
    patches = sum(t * rows * columns for t, rows, columns in work.grids)
    full_pairs = sum(t * (rows * columns) ** 2 for t, rows, columns in work.grids)
    windows = [w for grid in work.grids for w in window_lengths(grid, shape.window_patches)]
    windowed_layers = shape.vision_depth - shape.vision_full_layers
    pairs = shape.vision_full_layers * full_pairs + windowed_layers * sum(w * w for w in windows)
    patch = 2 * patches * PATCH_VALUES * d
    linear = 2 * patches * (4 * d * d + 3 * d * shape.vision_intermediate)
    merged = patches / MERGE
    layer = 2 * (2 * h * h + 2 * h * shape.kv_width + 3 * h * shape.intermediate)
    text_pairs = sum(n * (n + 1) / 2 if causal else n * n for n in work.lengths)
    return ForwardFlops(
        patch=patch,
        vision=patch + shape.vision_depth * linear + 4 * d * pairs,
        merger=2 * merged * ((MERGE * d) ** 2 + MERGE * d * h),
        lm=shape.layers * sum(work.lengths) * layer,
        lm_attention=4 * h * shape.layers * text_pairs,
        head=2 * h * shape.vocab * work.num_labels,
    )


def model_flops(shape: ModelShape, work: Workload, *, stage: int, causal: bool = True) -> float:
    """Return the FLOPs of forward and backward in a stage.

    Stage 2 trains everything. Stage 1 trains the vision encoder with the merger: the frozen
    language model computes input gradients only (its attention has no weights, so its backward is
    whole). No gradient reaches the pixels.

    Raises:
        ValueError: if the stage is neither 1 nor 2.
    """
    forward = forward_flops(shape, work, causal=causal)
    if stage == 2:
        return 3 * forward.total - forward.patch
    if stage == 1:
        trained = 3 * (forward.vision + forward.merger) - forward.patch
        return trained + 2 * (forward.lm + forward.head) + 3 * forward.lm_attention
    raise ValueError(f"stage must be 1 or 2, got {stage}")


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by `torch.cuda.get_device_name`; None if unknown."""
    for pattern, tflops in _PEAK_TFLOPS:
        if pattern.search(device_name):
            return tflops * 1e12
    return None


def mfu(flops: float, seconds: float, peak: float, *, num_devices: int = 1) -> float:
    """Return model FLOPs utilisation: FLOPs done over FLOPs the devices could do in that time."""
    return flops / (seconds * num_devices * peak)


def workload(lengths: Sequence[int], grids: Sequence[Sequence[int]], num_labels: int) -> Workload:
    """Build a Workload from any sequences (rows of a `grid_thw` tensor on the CPU included)."""
    shapes = tuple((int(t), int(rows), int(columns)) for t, rows, columns in grids)
    return Workload(tuple(int(length) for length in lengths), shapes, int(num_labels))
