"""Parameter names of Qwen2.5-VL: in memory, on the hub, under an adapter, and by part of the model.

In memory (transformers 5): `model.visual.*`, `model.language_model.*`, `lm_head.weight`. On the hub
and in every exported folder: `visual.*`, `model.*`, `lm_head.weight`.
"""

import re

VISION_PREFIX = "model.visual."
MERGER_PREFIX = "model.visual.merger."
LANGUAGE_PREFIX = "model.language_model."

_ADAPTER = re.compile(r"\.lora_[A-Za-z_]+(\.|$)")


def hub_name(memory_name: str) -> str:
    """Return the name under which a parameter is stored in a Hugging Face folder."""
    name = re.sub(r"^model\.visual\.", "visual.", memory_name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def memory_name(hub_name: str) -> str:
    """Return the name in `named_parameters()`; a name that already is one stays as it is."""
    name = re.sub(r"^visual\.", VISION_PREFIX, hub_name)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", LANGUAGE_PREFIX, name)


def plain_name(memory_name: str) -> str:
    """Return the name without the layer that peft puts around an adapted module."""
    return memory_name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Tell whether the parameter belongs to an adapter (`lora_A`, `lora_B`)."""
    return _ADAPTER.search(name) is not None


def is_vision(name: str) -> bool:
    """Tell whether the parameter (name in memory) is in the vision encoder or its merger."""
    return name.startswith(VISION_PREFIX)


def is_merger(name: str) -> bool:
    """Tell whether the parameter (name in memory) is in the merger (vision to language)."""
    return name.startswith(MERGER_PREFIX)


def module_group(name: str) -> str:
    """Return the part of the model: "vision", "merger", "language_model" or "lm_head".

    Raises:
        ValueError: if the name (in memory) belongs to none of them.
    """
    if is_merger(name):
        return "merger"
    if is_vision(name):
        return "vision"
    if name.startswith(LANGUAGE_PREFIX):
        return "language_model"
    if name.startswith("lm_head."):
        return "lm_head"
    raise ValueError(f"{name} is not a parameter of Qwen2.5-VL (expected model.visual.*, ...)")
