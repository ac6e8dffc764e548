"""A checkpoint of plain tensors, as any number of ranks would write it, without an engine."""

from pathlib import Path
from typing import Any

import torch

from train.checkpoint.manifest import Manifest, step_folder_name, write_manifest
from train.checkpoint.shards import partition
from train.checkpoint.write import write_shard


def write_checkpoint(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    world_size: int,
    step: int,
    parameters: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX` with these tensors (key -> whole tensor) in slices."""
    checkpoint = folder / step_folder_name(step)
    checkpoint.mkdir(parents=True)
    shards = []
    for rank in range(world_size):
        ranges = {key: partition(t.numel(), world_size, rank) for key, t in tensors.items()}
        layout = {key: (torch.float32, (end - start,)) for key, (start, end) in ranges.items()}
        table = {key: (list(tensors[key].shape), *ranges[key]) for key in tensors}
        slices = (tensors[key].reshape(-1)[start:end] for key, (start, end) in ranges.items())
        shards.append(write_shard(checkpoint, rank, world_size, layout, table, slices))
    manifest = Manifest(
        step=step,
        world_size=world_size,
        shards=shards,
        groups=[],
        optimizer_steps=[],
        counters={},
        state={},
        parameters=parameters or {},
    )
    write_manifest(checkpoint, manifest)
    return checkpoint


def parameters_of(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Return the manifest's table of a model's parameters."""
    return {
        name: {"shape": list(p.shape), "trainable": p.requires_grad}
        for name, p in model.named_parameters()
    }
