"""A random Qwen2.5-VL of the real architecture that is small enough for a test."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from train.modeling import tiny
from train.modeling.names import hub_name


def tiny_config(tied: bool = False) -> Qwen2_5_VLConfig:
    """Return a config: hidden 32, two decoder layers, two vision blocks (one with windows)."""
    return Qwen2_5_VLConfig.from_dict(tiny.tiny_config(hidden=32, layers=2, tied=tied))


def tiny_model(seed: int = 0, tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """Return the model of `tiny_config`, float32, with weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(tiny_config(tied)).float()


def tiny_folder(folder: Path, seed: int = 0, tied: bool = False) -> Path:
    """Write the model of `tiny_model` as a Hugging Face folder (flat config, bf16, hub names)."""
    tiny.write_model_files(folder, tiny.tiny_config(hidden=32, layers=2, tied=tied))
    weights = {
        hub_name(name): p.detach().bfloat16()
        for name, p in tiny_model(seed, tied).named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_inputs(seed: int = 0, num_text: int = 6) -> dict[str, torch.Tensor]:
    """Return model inputs: an image of 4 x 4 patches (4 visual tokens), then random text.

    Returns:
        input_ids and mm_token_type_ids (1, 4 + num_text), pixel_values (16, 1176),
        image_grid_thw (1, 3).
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 256, (num_text,), generator=generator)
    ids = torch.cat([torch.full((4,), tiny.IMAGE_PAD), text])[None]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == tiny.IMAGE_PAD).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
