"""Block-diagonal attention over packed documents, registered with transformers by name.

On a GPU one variable-length call a layer (flash-attn or torch's own kernel), on a CPU SDPA document
by document. Never a T x T mask: packing is carried by `cu_seq_lens` alone, and no attention_mask is
ever passed, since an all-ones mask would silently let documents see each other.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from data_tools.errors import ConfigError

CPU_NAME = "lectern_documents"
VARLEN_NAME = "lectern_flash_varlen"  # "flash" in the name: one call a layer in the vision tower
PACKAGES = {"flash_attention_2": "flash_attn", "varlen": "torch.nn.attention.varlen"}


def choose_attention(setting: str, device_type: str, precision: str) -> dict[str, str]:
    """Return the implementation of the language model and of the vision encoder.

    Args:
        setting: `model.attention` of the configuration.
        device_type: "cpu" or "cuda".
        precision: "bf16" or "fp32"; the variable-length kernels take half precision only.

    Raises:
        ConfigError: if the setting cannot run on this machine.
    """
    register()
    by_document = {"text_config": CPU_NAME, "vision_config": "sdpa"}
    if setting == "sdpa" or (setting == "auto" and (device_type == "cpu" or precision == "fp32")):
        return by_document
    if device_type == "cpu" or precision == "fp32":
        raise ConfigError(f"model.attention={setting} needs a GPU and bf16; use auto or sdpa")
    missing = {name: not _has(package) for name, package in PACKAGES.items()}
    wanted = [setting] if setting != "auto" else list(PACKAGES)
    name = next((name for name in wanted if not missing[name]), None)
    if name is None:
        raise ConfigError(
            f"model.attention={setting}: {' and '.join(PACKAGES[name] for name in wanted)} cannot "
            "be imported; install flash-attn (docs/gpu.md) or a torch with "
            "torch.nn.attention.varlen, or use model.attention=sdpa (slow: the vision encoder then "
            "runs window by window)"
        )
    implementation = VARLEN_NAME if name == "varlen" else name
    return {"text_config": implementation, "vision_config": implementation}


def decoding_attention(setting: str, device_type: str, precision: str) -> dict[str, str]:
    """Return the implementation for batched decoding.

    The language model needs SDPA with its mask, since batches are padded on the left. In the vision
    encoder SDPA would run once a window, so it keeps the implementation of training.
    """
    vision = choose_attention(setting, device_type, precision)["vision_config"]
    return {"text_config": "sdpa", "vision_config": vision}


def _has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def register() -> None:
    """Make the implementations known to transformers; harmless when repeated."""
    AttentionInterface.register(CPU_NAME, document_attention)
    AttentionInterface.register(VARLEN_NAME, varlen_attention)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run causal SDPA once a document.

    Args:
        module: the attention layer.
        query: (1, heads, T, head_dim).
        key: (1, kv heads, T, head_dim).
        value: likewise.
        attention_mask: must be None.
        scaling: of the scores.
        dropout: on the attention weights.
        cu_seq_lens_q: (D + 1,) int32, borders of the documents; None takes the row as one.
        **kwargs: what transformers passes to every implementation.

    Returns:
        (1, T, heads, head_dim) and no attention weights.

    Raises:
        ValueError: for padded or cached input, which carries its structure in a mask.
    """
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or attention_mask is not None:
        raise ValueError(f"{CPU_NAME} is for packed training rows; decode with SDPA")
    borders = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    outputs = []
    for start, end in zip(borders, borders[1:], strict=False):
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                dropout_p=dropout,
                is_causal=True,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run torch's variable-length flash attention: one call for all documents or windows.

    Shapes as in `document_attention`. Causal in the language model; the vision encoder passes
    `is_causal=False`.
    """
    from torch.nn.attention.varlen import varlen_attn

    causal = module.is_causal if is_causal is None else is_causal
    output: Any = varlen_attn(
        _rows(query),
        _rows(key),
        _rows(value),
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None], None


def _rows(tensor: Tensor) -> Tensor:
    """Turn (1, heads, T, head_dim) into (T, heads, head_dim)."""
    return tensor[0].transpose(0, 1).contiguous()
