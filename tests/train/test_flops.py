"""FLOPs in closed form: published figures, and equality with counted operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from train.modeling.flops import (
    ModelShape,
    Workload,
    forward_flops,
    mfu,
    model_flops,
    peak_flops,
    window_lengths,
    workload,
)
from train.modeling.tiny import IMAGE_PAD, tiny_config

VISION = {
    "vision_hidden": 1280,
    "vision_intermediate": 3420,
    "vision_depth": 32,
    "vision_full_layers": 4,
    "window_patches": 8,
}
SHAPE_7B = ModelShape(3584, 18944, 28, 512, 152064, **VISION)
SHAPE_3B = ModelShape(2048, 11008, 36, 256, 151936, **VISION)
GRIDS = [(106, 76), (106, 76), (128, 64), (92, 42), (100, 72), (50, 72), (4, 86), (4, 58)]
EIGHT = workload(
    [3439, 2559, 2333, 1211, 2175, 1105, 135, 99], [(1, *grid) for grid in GRIDS], 2970
)
TF = 1e12


def test_eight_documents_are_the_published_ones():
    assert sum(EIGHT.lengths) == 13056
    windows = [window_lengths(grid) for grid in EIGHT.grids]
    assert [len(w) for w in windows] == [140, 140, 128, 72, 117, 63, 11, 8]
    assert sum(sum(w) for w in windows) == 39544
    assert sum(length**2 for w in windows for length in w) == 2_440_512


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (SHAPE_7B, {"vision": 55.96, "merger": 0.88, "lm": 170.39, "lm_attention": 12.55}),
        (SHAPE_3B, {"vision": 55.96, "lm": 72.45, "lm_attention": 9.22, "head": 1.85}),
    ],
)
def test_forward_parts_of_the_eight_documents(shape, expected):
    forward = forward_flops(shape, EIGHT, causal=False)
    for name, teraflops in expected.items():
        assert getattr(forward, name) / TF == pytest.approx(teraflops, abs=0.006), name
    total = {SHAPE_7B: 243.02, SHAPE_3B: 140.20}[shape]
    assert forward.total / TF == pytest.approx(total, abs=0.01)


def test_model_flops_of_the_eight_documents_at_7b():
    assert model_flops(SHAPE_7B, EIGHT, stage=2) / TF == pytest.approx(710.1, abs=0.06)
    assert model_flops(SHAPE_7B, EIGHT, stage=1) / TF == pytest.approx(536.5, abs=0.06)
    # 732.2 counted densely, of which one head forward (3.24) is chunked cross-entropy's own.
    dense = model_flops(SHAPE_7B, EIGHT, stage=2, causal=False)
    head = forward_flops(SHAPE_7B, EIGHT).head
    assert (dense + head) / TF == pytest.approx(732.2, abs=0.06)
    dense = model_flops(SHAPE_7B, EIGHT, stage=1, causal=False)
    assert (dense + head) / TF == pytest.approx(558.5, abs=0.06)


def test_model_flops_of_the_eight_documents_at_3b():
    # Stage formula on the forward parts above, causal attention at half of 9.22.
    assert model_flops(SHAPE_3B, EIGHT, stage=2) / TF == pytest.approx(406.7, abs=0.1)
    assert model_flops(SHAPE_3B, EIGHT, stage=1) / TF == pytest.approx(332.4, abs=0.1)
    with pytest.raises(ValueError, match="stage must be 1 or 2, got 3"):
        model_flops(SHAPE_3B, EIGHT, stage=3)


class CountFlops(TorchDispatchMode):
    """Sum the FLOPs of every operation; SDPA decomposes into counted products on meta."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("stage", [1, 2])
def test_closed_form_equals_counted_operations_of_the_real_module(stage, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    config = Qwen2_5_VLConfig(**tiny_config(hidden=64, layers=3))
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    grid, text = (1, 12, 20), 30  # windows of 64, 32, 32 and 16 patches
    visual = 12 * 20 // 4
    if stage == 1:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".visual." in name)
    ids = torch.tensor([[IMAGE_PAD] * visual + [65] * text])
    positions = torch.arange(visual + text).expand(3, 1, -1)
    counter = CountFlops()
    with counter:
        logits = model(
            input_ids=ids,
            position_ids=positions,
            pixel_values=torch.randn(grid[1] * grid[2], 1176),
            image_grid_thw=torch.tensor([grid]),
            use_cache=False,
        ).logits
        logits.sum().backward()
    work = Workload((visual + text,), (grid,), visual + text)
    expected = model_flops(ModelShape.of(config), work, stage=stage, causal=False)
    # Beyond the closed form eager counts only the rotary frequencies (an outer product).
    assert counter.flops == pytest.approx(expected, rel=2e-4)


def test_peak_is_known_by_device_name_and_mfu_is_a_share_of_it():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("NVIDIA GH200 480GB") is None
    assert mfu(710.1e12, 1.795, 989e12) == pytest.approx(0.40, abs=0.001)
