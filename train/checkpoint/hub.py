"""The weights of a checkpoint as Hugging Face files, one tensor in memory at a time.

A flat sequence of slices is the tensor in C order, so a trained parameter is put together without
a model or an engine. Frozen ones come from the files of the base model, adapters are merged.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from data_tools.errors import CheckpointError
from train.checkpoint.manifest import BLOCK_BYTES, Manifest, write_text
from train.checkpoint.shards import DTYPE_NAMES, SliceReader, write_safetensors
from train.modeling.names import hub_name, is_adapter, memory_name, plain_name

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD = "lm_head.weight"


class BaseWeights:
    """The safetensors files of a Hugging Face folder, by name in memory; may hold none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        if folder is None:
            return
        index = folder / INDEX_FILE
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {name: folder / file for name, file in weight_map.items()}
        elif (single := folder / SINGLE_FILE).is_file():
            places = {name: single for name in self._open(single).keys()}  # noqa: SIM118
        else:
            places = {}
        self._places = {memory_name(name): (path, name) for name, path in places.items()}

    @property
    def names(self) -> set[str]:
        """Names in memory of everything that the folder holds."""
        return set(self._places)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its name in memory.

        Raises:
            CheckpointError: if the folder does not hold it.
        """
        if name not in self._places:
            raise CheckpointError(
                f"{name} is not in the checkpoint, and there is no weight file of the base model "
                f"with it ({self.folder or 'trained from scratch'})."
            )
        path, stored = self._places[name]
        try:
            tensor: torch.Tensor = self._open(path).get_tensor(stored)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error}).") from error
        return tensor

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]


@dataclass(frozen=True)
class WeightSource:
    """Every weight of the trained model under its hub name.

    Attributes:
        manifest: of the checkpoint.
        reader: of the checkpoint's shards.
        base: where frozen weights come from.
        tied: the head is the embedding: the model has no parameter of that name.
        adapter_scale: alpha / rank of LoRA; None if there is no adapter.
    """

    manifest: Manifest
    reader: SliceReader
    base: BaseWeights
    tied: bool = False
    adapter_scale: float | None = None
    _stored: dict[str, str] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.manifest.parameters:
            if is_adapter(name):
                if self.adapter_scale is None:
                    raise CheckpointError(f"{name}: an adapter, but model.adapter is not set.")
            else:
                self._stored[hub_name(plain_name(name))] = name
        surplus = self.base.names - {memory_name(name) for name in self._stored}
        if self.tied:
            surplus.discard(HEAD)
        if surplus:
            raise CheckpointError(
                f"{self.base.folder} holds {len(surplus)} weights that the trained model has not, "
                f"for example {min(surplus)}; is model.path the folder it started from?"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return hub name -> shape, in the model's order."""
        parameters = self.manifest.parameters
        return {hub: tuple(parameters[name]["shape"]) for hub, name in self._stored.items()}

    def read(self, hub: str) -> torch.Tensor:
        """Return a weight by its hub name: trained ones in float32, frozen ones as the base's."""
        name = self._stored[hub]
        weight = self._parameter(name)
        stem = name.removesuffix(".base_layer.weight")
        if stem == name:
            return weight
        assert self.adapter_scale is not None, name
        first = self._parameter(f"{stem}.lora_A.default.weight")  # (rank, inputs)
        second = self._parameter(f"{stem}.lora_B.default.weight")  # (outputs, rank)
        return weight.float() + (second.float() @ first.float()) * self.adapter_scale

    def _parameter(self, name: str) -> torch.Tensor:
        about = self.manifest.parameters[name]
        shape = torch.Size(about["shape"])
        if about["trainable"]:
            return self.reader.read(f"fp32|{name}", 0, shape.numel()).view(shape)
        tensor = self.base.read(plain_name(name))
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self.base.folder}: {name} has shape {list(tensor.shape)}, the trained model "
                f"{list(shape)}; is model.path the folder it started from?"
            )
        return tensor


def plan_files(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Split names, in order, into files of at most `max_bytes` (a larger tensor has its own)."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def write_weights(
    folder: Path, source: WeightSource, dtype: torch.dtype, max_bytes: int
) -> dict[str, str]:
    """Write the weight files (and their index, if there are several) of a Hugging Face folder.

    Returns:
        File name -> sha256 of its content.
    """
    shapes = source.shapes()
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    files = plan_files(sizes, max_bytes)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    with tqdm(total=len(shapes), unit="tensor", disable=not sys.stderr.isatty()) as bar:
        for number, names in enumerate(files, start=1):
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            file = SINGLE_FILE if len(files) == 1 else file

            def tensors(names: list[str] = names) -> Iterator[torch.Tensor]:
                for name in names:
                    yield source.read(name).to(dtype).contiguous()
                    bar.update()

            digest = hashlib.sha256()
            layout = {name: (dtype, shapes[name]) for name in names}
            write_safetensors(folder / file, layout, tensors(), digest, {"format": "pt"})
            digests[file] = digest.hexdigest()
            weight_map |= dict.fromkeys(names, file)
            if bar.disable and len(files) > 1:
                print(f"{file} written ({number} of {len(files)})", file=sys.stderr)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return digests


def check_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    digests: dict[str, str],
) -> None:
    """Read the weight files back: names, shapes, dtype and every byte.

    Raises:
        CheckpointError: naming the file and what differs.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file, expected in digests.items():
        digest = hashlib.sha256()
        with (folder / file).open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise CheckpointError(f"{folder / file}: what was read back is not what was written.")
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                about = tensors.get_slice(name)
                found[name] = tuple(about.get_shape())
                if about.get_dtype() != DTYPE_NAMES[dtype]:
                    raise CheckpointError(f"{folder / file}: {name} is {about.get_dtype()}.")
    if found != shapes:
        differing = sorted(n for n in found.keys() | shapes if found.get(n) != shapes.get(n))
        raise CheckpointError(f"{folder}: names or shapes differ, for example {differing[:3]}.")
