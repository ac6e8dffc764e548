"""The weights of a trained model in blocks of a few MiB, whatever the size of the model.

A flat sequence of slices is a tensor in C order, so a trained parameter needs no model, no engine
and no assembly. Frozen parameters come from the files of the base model. Adapters are merged by
blocks of rows. Several checkpoints are averaged block by block.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_tools.errors import CheckpointError
from train.checkpoint.files import BLOCK_BYTES, TensorFile
from train.checkpoint.manifest import Manifest, read_manifest
from train.checkpoint.shards import SliceReader
from train.modeling.names import hub_name, is_adapter, memory_name, plain_name

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD = "lm_head.weight"
SAMPLES, SAMPLE_BYTES = 64, 65536
BLOCK_ELEMENTS = BLOCK_BYTES // 4  # in float32


class BaseWeights:
    """The safetensors files of a Hugging Face folder, by name in memory; may hold none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._files: dict[Path, TensorFile] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        if folder is None:
            return
        index = folder / INDEX_FILE
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            places = {name: folder / file for name, file in weight_map.items()}
        elif (single := folder / SINGLE_FILE).is_file():
            places = dict.fromkeys(self._open(single).entries, single)
        else:
            places = {}
        self._places = {memory_name(name): (path, name) for name, path in places.items()}

    @property
    def names(self) -> set[str]:
        """Names in memory of everything that the folder holds."""
        return set(self._places)

    def identity(self) -> dict[str, str]:
        """Return {"path", "sha256"}: what tells the weights of this folder from others.

        The digest is of every file's name, size, header and 64 KiB at 64 places: other weights
        differ nearly everywhere, and a model of 16 GB is not read as a whole.
        """
        digest = hashlib.sha256()
        for path in sorted({path for path, _ in self._places.values()}):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb", buffering=0) as file:
                step = max(SAMPLE_BYTES, size // SAMPLES)
                for place in range(0, size, step):
                    file.seek(place)
                    digest.update(file.read(SAMPLE_BYTES))
        return {"path": str(self.folder), "sha256": digest.hexdigest()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its name in memory.

        Raises:
            CheckpointError: if the folder does not hold it.
        """
        file, stored = self._find(name)
        return file.entries[stored].shape

    def read(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Return elements [start, end) of a tensor, flat, in the dtype of the file."""
        file, stored = self._find(name)
        return file.read(stored, start, end)

    def _find(self, name: str) -> tuple[TensorFile, str]:
        if name not in self._places:
            raise CheckpointError(
                f"{name} is not in the checkpoint, and there is no weight file of the base model "
                f"with it ({self.folder or 'trained from scratch'})."
            )
        path, stored = self._places[name]
        file = self._open(path)
        if stored not in file.entries:
            raise CheckpointError(f"{path} does not hold {stored}, which its index says it does.")
        return file, stored

    def _open(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]


@dataclass(frozen=True)
class Origin:
    """Where exported weights come from; plain values that another process can open.

    Attributes:
        checkpoints: one, or several that are averaged; all of the same model.
        shares: of the average, one a checkpoint, adding up to 1.
        base: folder of frozen weights; None if everything was trained from scratch.
        tied: the head is the embedding: the model has no parameter of that name.
        adapter_scale: alpha / rank of LoRA; None if there is no adapter.
    """

    checkpoints: tuple[Path, ...]
    shares: tuple[float, ...] = (1.0,)
    base: Path | None = None
    tied: bool = False
    adapter_scale: float | None = None

    def open(self) -> "TrainedWeights":
        """Open the files; CheckpointError if they are not of the same model."""
        return TrainedWeights(self)


@dataclass
class TrainedWeights:
    """Every weight of the trained model under its hub name.

    Raises:
        CheckpointError: if checkpoints and base are not of the same model.
    """

    origin: Origin
    manifest: Manifest = field(init=False)
    _readers: list[SliceReader] = field(init=False, repr=False)
    _base: BaseWeights = field(init=False, repr=False)
    _stored: dict[str, str] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        manifests = [read_manifest(path) for path in self.origin.checkpoints]
        self.manifest = manifests[-1]
        for path, manifest in zip(self.origin.checkpoints, manifests, strict=True):
            if manifest.parameters != self.manifest.parameters:
                raise CheckpointError(
                    f"{path} holds another model than {self.origin.checkpoints[-1]}; only "
                    "checkpoints of one stage can be averaged."
                )
        self._readers = [
            SliceReader(path, manifest)
            for path, manifest in zip(self.origin.checkpoints, manifests, strict=True)
        ]
        self._base = BaseWeights(self.origin.base)
        identity = self._base.identity() if self.origin.base else None
        for path, manifest in zip(self.origin.checkpoints, manifests, strict=True):
            if problems := other_base(manifest, identity):
                raise CheckpointError(
                    f"{path}: {problems[0]}. Export beside the weights that the training froze"
                )
        for name in self.manifest.parameters:
            if is_adapter(name):
                if self.origin.adapter_scale is None:
                    raise CheckpointError(f"{name}: an adapter, but model.adapter is not set.")
            else:
                self._stored[hub_name(plain_name(name))] = name
        surplus = self._base.names - {memory_name(name) for name in self._stored}
        if self.origin.tied:
            surplus.discard(HEAD)
        if surplus:
            raise CheckpointError(
                f"{self.origin.base} holds {len(surplus)} weights that the trained model has not, "
                f"for example {min(surplus)}; is model.path the folder it started from?"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return hub name -> shape, in the model's order."""
        parameters = self.manifest.parameters
        return {hub: tuple(parameters[name]["shape"]) for hub, name in self._stored.items()}

    def blocks(self, hub: str) -> Iterator[torch.Tensor]:
        """Yield a weight by its hub name, in flat blocks in order.

        Trained ones are float32, frozen ones have the dtype of the base. A block is only valid
        until the next one is asked for.
        """
        name = self._stored[hub]
        if name.endswith(".base_layer.weight"):
            yield from self._merged(name.removesuffix(".base_layer.weight"))
            return
        numel = math.prod(self.manifest.parameters[name]["shape"])
        buffers = self._buffers(min(numel, BLOCK_ELEMENTS))
        for start in range(0, numel, BLOCK_ELEMENTS):
            yield self._part(name, start, min(numel, start + BLOCK_ELEMENTS), buffers)

    def _merged(self, stem: str) -> Iterator[torch.Tensor]:
        """Yield W + B A alpha / rank (Hu et al. 2021), averaged over the checkpoints."""
        name = f"{stem}.base_layer.weight"
        outputs, inputs = self.manifest.parameters[name]["shape"]
        rows = max(1, BLOCK_ELEMENTS // inputs)
        rank = self.manifest.parameters[f"{stem}.lora_A.default.weight"]["shape"][0]
        assert self.origin.adapter_scale is not None, name
        for first in range(0, outputs, rows):
            last = min(outputs, first + rows)
            start, end = first * inputs, last * inputs
            weight = self._part(name, start, end, self._buffers(end - start)).float()
            delta = torch.zeros(last - first, inputs)
            for reader, share in zip(self._readers, self.origin.shares, strict=True):
                down = reader.read(f"fp32|{stem}.lora_A.default.weight", 0, rank * inputs)
                up = reader.read(f"fp32|{stem}.lora_B.default.weight", first * rank, last * rank)
                delta += share * (up.view(-1, rank) @ down.view(rank, inputs))
            yield weight + delta.view(-1) * self.origin.adapter_scale

    def _part(
        self, name: str, start: int, end: int, buffers: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        about = self.manifest.parameters[name]
        if about["trainable"]:
            return self._average(f"fp32|{name}", start, end, buffers)
        shape = self._base.shape(plain_name(name))
        if shape != tuple(about["shape"]):
            raise CheckpointError(
                f"{self.origin.base}: {name} has shape {list(shape)}, the trained model "
                f"{about['shape']}; is model.path the folder it started from?"
            )
        return self._base.read(plain_name(name), start, end)

    def _average(
        self, key: str, start: int, end: int, buffers: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        part, total = buffers[0][: end - start], buffers[1][: end - start]
        self._readers[0].read_into(key, start, part)
        if len(self._readers) == 1:
            return part
        torch.mul(part.double(), self.origin.shares[0], out=total)
        for reader, share in zip(self._readers[1:], self.origin.shares[1:], strict=True):
            reader.read_into(key, start, part)
            total.add_(part, alpha=share)
        return total.float()

    def _buffers(self, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for a block, and for its sum in float64 where there is something to add."""
        is_average = len(self._readers) > 1
        return torch.empty(numel), torch.empty(numel * is_average, dtype=torch.float64)


def other_base(manifest: Manifest, base: dict[str, str] | None) -> list[str]:
    """Say where frozen weights would not be those that a checkpoint was trained beside.

    Args:
        manifest: of the checkpoint.
        base: `BaseWeights.identity` of the frozen weights at hand; None: not to be compared.
    """
    is_partial = any(not about["trainable"] for about in manifest.parameters.values())
    saved = manifest.base or {}
    if not is_partial or base is None or saved.get("sha256") in (None, base.get("sha256")):
        return []
    return [
        f"its frozen weights are those of {saved.get('path')} (sha256 {saved['sha256'][:12]}), "
        f"model.path is {base.get('path')} (sha256 {str(base.get('sha256'))[:12]})"
    ]


def average_shares(count: int, decay: float | None = None) -> tuple[float, ...]:
    """Return the shares of `count` checkpoints, oldest first.

    Args:
        count: of checkpoints.
        decay: None is the uniform mean (Izmailov et al. 2018); else each checkpoint counts `decay`
            times as much as the next newer one, an exponential moving average over checkpoints.
    """
    raw = [1.0 if decay is None else decay ** (count - 1 - i) for i in range(count)]
    return tuple(share / sum(raw) for share in raw)


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


def file_names(files: Sequence[list[str]]) -> list[str]:
    """Return the hub's names of weight files."""
    if len(files) == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
