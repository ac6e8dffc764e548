"""Checkpoints of a ZeRO run: saved whole or not at all, loaded at any world size."""

from train.checkpoint.load import load_checkpoint, newest_checkpoint
from train.checkpoint.manifest import (
    Manifest,
    find_checkpoint,
    list_checkpoints,
    newest_valid,
    read_manifest,
    verify,
)
from train.checkpoint.save import CheckpointSaver, SaveSettings
from train.checkpoint.shards import SliceReader

__all__ = [
    "CheckpointSaver",
    "Manifest",
    "SaveSettings",
    "SliceReader",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "newest_checkpoint",
    "newest_valid",
    "read_manifest",
    "verify",
]
