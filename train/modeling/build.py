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


def build_model(
    folder: str, *, init: str, precision: str, attention: dict[str, str], seed: int
) -> Any:
    """Return the model of a folder.

    Args:
        folder: with config.json and, unless `init` is "scratch", safetensors.
        init: "pretrained" or "scratch" (random weights drawn from `seed`).
        precision: "bf16" or "fp32".
        attention: implementation of `text_config` and `vision_config`.
        seed: of random weights.

    Raises:
        ConfigError: if the folder holds no weights or weights of another shape.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = DTYPES[precision]
    # transformers looks for a package behind any name with "flash" in it: ours is set afterwards.
    known = {part: "sdpa" if name == VARLEN_NAME else name for part, name in attention.items()}
    if init == "scratch":
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder)
        config.dtype = dtype
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=known
        )
    else:
        if not list(Path(folder).glob("*.safetensors")):
            raise ConfigError(
                f"model.path: {folder} holds no *.safetensors; download the model there, "
                "or set model.init=scratch"
            )
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=known, output_loading_info=True
        )
        model, report = loaded
        _check_names(folder, report)
    model.config.use_cache = False
    _set_attention(model, attention)
    return model


def build_empty_model(
    folder: str, *, precision: str, attention: dict[str, str], device: torch.device
) -> Any:
    """Return a model of a folder's shape on a device, its weights unset, for a copy to be put in.

    Draws no random numbers and holds nothing on the host.
    """
    transformers.logging.set_verbosity_error()
    dtype = DTYPES[precision]
    with torch.random.fork_rng(), no_init_weights(), device:
        config = AutoConfig.from_pretrained(folder)
        known = {part: "sdpa" for part in attention}
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation=known
        )
    model.tie_weights()
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


def _check_names(folder: str, report: dict[str, Any]) -> None:
    problems = {
        kind: sorted(report.get(kind) or ())
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    found = [f"{kind}: {names[:3]}" for kind, names in problems.items() if names]
    if found:
        raise ConfigError(f"model.path: the weights in {folder} do not fit its config: {found}")
