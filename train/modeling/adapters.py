"""LoRA through peft in its plain form: injected into linear layers of the trained parts."""

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from data_tools.errors import ConfigError
from train.modeling.names import is_merger, is_vision


def add_adapter(
    model: Any, *, rank: int, alpha: int, dropout: float, targets: list[str], stage: int
) -> Any:
    """Put a LoRA adapter on every targeted linear layer of the parts that the stage trains.

    All other parameters are frozen. The names become `X.base_layer.weight`,
    `X.lora_A.default.weight` and `X.lora_B.default.weight`; the export merges them.

    Raises:
        ConfigError: if no layer has one of the names.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rsplit(".", 1)[-1] in targets
        and (stage == 2 or (is_vision(name) and not is_merger(name)))
    ]
    if not names:
        raise ConfigError(f"model.adapter.targets: no linear layer of stage {stage} in {targets}")
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model
