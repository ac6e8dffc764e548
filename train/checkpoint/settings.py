"""The checkpoints of a stage as its configuration wants them."""

from pathlib import Path
from typing import Any

from train.checkpoint.save import SaveSettings
from train.checkpoint.weights import BaseWeights
from train.config import Config


def save_settings(config: Config) -> SaveSettings:
    """Return how the checkpoints of a stage are saved."""
    section = config.checkpoint
    mirror = section.mirror
    return SaveSettings(
        keep_last=section.keep_last,
        keep_every=section.keep_every,
        in_background=section.in_background,
        local_dir=section.local_dir,
        mirror=f"{mirror.rstrip('/')}/{config.folder.name}" if mirror else None,
        on_error=section.on_error,
        timeout_s=section.timeout_s,
    )


def base_identity(config: Config) -> dict[str, Any] | None:
    """Return what tells the weights that a stage starts from; None if it starts from scratch."""
    if config.model.init == "scratch":
        return None
    return BaseWeights(Path(config.model.path)).identity()
