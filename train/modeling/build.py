"""Build a Qwen2.5-VL from a Hugging Face folder, or from its config with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.initialization import no_init_weights

from data_tools.errors import ConfigError
from train.modeling.attention import VARLEN_NAME
from train.modeling.pixels import PixelNormalizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_random_model(folder: str, *, precision: str, attention: dict[str, str], seed: int) -> Any:
    """Return a model of a folder's shape with random weights.

    Args:
        folder: with config.json.
        precision: "bf16" or "fp32".
        attention: implementation of `text_config` and `vision_config`.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    return _from_config(folder, precision, attention)


def build_empty_model(
    folder: str, *, precision: str, attention: dict[str, str], device: torch.device
) -> Any:
    """Return a model of a folder's shape on a device, its weights unset, to be filled.

    Draws no random numbers. Where a DeepSpeed ZeRO-3 configuration is alive in transformers, every
    parameter is partitioned as soon as it is made.
    """
    with torch.random.fork_rng(), no_init_weights(), device:
        model = _from_config(folder, precision, attention)
    model.tie_weights()
    return model


def _from_config(folder: str, precision: str, attention: dict[str, str]) -> Any:
    transformers.logging.set_verbosity_error()
    dtype = DTYPES[precision]
    config = AutoConfig.from_pretrained(folder)
    config.dtype = dtype
    # transformers looks for a package behind any name with "flash" in it: ours is set afterwards.
    known = {part: "sdpa" if name == VARLEN_NAME else name for part, name in attention.items()}
    model: Any = Qwen2_5_VLForConditionalGeneration._from_config(
        config, dtype=dtype, attn_implementation=known
    )
    model.config.use_cache = False
    _set_attention(model, attention)
    return model


def pixel_normalizer(folder: str) -> PixelNormalizer:
    """Return the normalisation of a folder's `preprocessor_config.json`."""
    try:
        text = (Path(folder) / "preprocessor_config.json").read_text(encoding="utf-8")
        record = json.loads(text)
        return PixelNormalizer(record["image_mean"], record["image_std"])
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"model.path: {folder}/preprocessor_config.json must give image_mean and image_std "
            f"({error})"
        ) from error


def _set_attention(model: Any, attention: dict[str, str]) -> None:
    model.model.language_model.config._attn_implementation_internal = attention["text_config"]
    model.model.visual.config._attn_implementation_internal = attention["vision_config"]
