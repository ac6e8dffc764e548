"""Checkpoints that DeepSpeed itself wrote, read slice by slice and without DeepSpeed.

Layouts (deepspeed 0.19.8, runtime/engine.py, utils/zero_to_fp32.py, checkpoint/ds_to_universal.py):

- ZeRO-3: of every parameter each rank holds ceil(numel / ranks) elements, one parameter behind the
  other in its flat groups; frozen ones are stored apart, split the same way;
- ZeRO-1 and 2: each rank holds an equal part of every flat group, and `param_slice_mappings` says
  which part of which parameter lies where; the rank-0 model file holds every weight as a whole;
- universal: zero/NAME/fp32.pt, the whole parameter.

The files are pickles, which can run any program. They are read by torch's restricted unpickler,
which makes nothing but tensors, plain values and the stand-ins below; anything else is refused.
Tensor data is mapped, so that memory holds the pages in use and the system may drop them.
"""

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from data_tools.errors import CheckpointError

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_UNREADABLE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    KeyError,
    UnpicklingError,
    zipfile.BadZipFile,
)

Shapes = dict[str, tuple[int, ...]]


def _stand_in(path: str, base: type = object) -> type:
    """Return an empty class that the unpickler takes for the class at `path`."""
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module})


ALLOWED = (
    _stand_in("deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    _stand_in("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    _stand_in("deepspeed.runtime.zero.config.ZeroStageEnum", int),
    _stand_in("deepspeed.utils.tensor_fragment.fragment_address"),
)


class _Parameters(Protocol):
    """Parameters of one kind, and where the elements of each lie."""

    shapes: Shapes

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements of a parameter in order, in flat tensors of any length."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """One checkpoint of DeepSpeed, opened.

    Attributes:
        folder: with the files of the ranks.
        layout: in words, with the number of ranks.
        step: optimizer steps done.
        version: of the DeepSpeed that wrote it.
        trained: parameters that the optimizer holds, float32.
        frozen: parameters that it does not, as far as they were stored.
        has_frozen: no parameter of the model is left out.
        shared: name of a parameter -> the name under which the same one is stored.
    """

    folder: Path
    layout: str
    step: int
    version: str
    trained: _Parameters
    frozen: _Parameters
    has_frozen: bool
    shared: dict[str, str]

    @property
    def shapes(self) -> Shapes:
        """Name, as the foreign trainer called it, -> shape of everything that is stored."""
        return {**self.trained.shapes, **self.frozen.shapes}

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the elements of a parameter in order, in flat tensors (mapped files).

        Raises:
            CheckpointError: if there are more or fewer than its shape says.
        """
        kind = self.trained if name in self.trained.shapes else self.frozen
        expected, found = math.prod(kind.shapes[name]), 0
        for piece in kind.pieces(name):
            found += piece.numel()
            yield piece
        if found != expected:
            raise CheckpointError(
                f"{self.folder}: {name} has {found} elements, expected {expected}; do all files "
                "belong to one save?"
            )

    def digest(self) -> str:
        """Return a sha256 of the CRC-32 of everything in the files.

        torch.save keeps one of each tensor in the file's table of contents; no more is read.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        digest = hashlib.sha256()
        for path in sorted([*self.folder.glob("*_states.pt"), *self.folder.glob("zero/*/fp32.pt")]):
            try:
                with zipfile.ZipFile(path) as archive:
                    records = [(e.filename, e.file_size, e.CRC) for e in archive.infolist()]
            except _UNREADABLE as error:
                raise _unreadable(path, error) from error
            digest.update(json.dumps([str(path.relative_to(self.folder)), records]).encode())
        return digest.hexdigest()


def open_foreign(checkpoint: Path, tag: str | None = None) -> ForeignCheckpoint:
    """Open a checkpoint of DeepSpeed: what `save_checkpoint` or `ds_to_universal` wrote.

    Args:
        checkpoint: the folder with `latest`, or that of a tag in it.
        tag: of the save; the one that `latest` names by default.

    Raises:
        CheckpointError: if it is incomplete, damaged, split in a way that is not supported, or
            holds anything but tensors and plain values.
    """
    files = _RankFiles(_find_folder(checkpoint, tag))
    try:
        return _open(files)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{files.folder}: not laid out as DeepSpeed 0.19 does it ({error!r}); was it written "
            "by a much older or newer one?"
        ) from error


def load_restricted(path: Path) -> Any:
    """Load a file of torch.save whose tensors are mapped; nothing in it is executed.

    Raises:
        CheckpointError: if it is unreadable, or names a class or function that is not allowed.
    """
    try:
        with safe_globals(list(ALLOWED)):
            refused = get_unsafe_globals_in_checkpoint(str(path))
            if refused:
                raise CheckpointError(
                    f"{path} contains {', '.join(sorted(refused))}, and loading that could run any "
                    "program. DeepSpeed does not write it by itself: it came with the client state "
                    "of the training, or from somebody else. Save again without it where the "
                    "checkpoint was made; nothing was executed."
                )
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).partition("\n")[0]
    return CheckpointError(
        f"{path} cannot be read ({reason}); was it cut off, or is it no file of torch.save?"
    )


def _find_folder(checkpoint: Path, tag: str | None) -> Path:
    """Return the folder with the files of the ranks."""
    if tag is None and _is_save(checkpoint):
        return checkpoint
    tags = [path.name for path in sorted(checkpoint.glob("*")) if _is_save(path)]
    known = f"tags there: {', '.join(tags) or 'none'}"
    latest = checkpoint / "latest"
    if tag is None:
        if not latest.is_file():
            raise CheckpointError(
                f"{checkpoint} holds neither files of ranks nor `latest`, which names the newest "
                f"save; choose one with --tag ({known})."
            )
        tag = latest.read_text(encoding="utf-8", errors="replace").strip()
        known += "; `latest` names it: choose another one with --tag"
    if tag not in tags:
        raise CheckpointError(f"{checkpoint}: no checkpoint {tag!r} ({known}).")
    return checkpoint / tag


def _is_save(folder: Path) -> bool:
    return any(folder.glob("*_model_states.pt")) or any(folder.glob("*_optim_states.pt"))


class _RankFiles:
    """The files of a save, by data-parallel rank.

    Attributes:
        folder: where they lie.
        whole: the model file of ZeRO-1 and 2, or None.
        models: those of ZeRO-3.
        optimizers: empty in the universal form.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole: Path | None = None
        self.models: dict[int, Path] = {}
        self.optimizers: dict[int, Path] = {}
        for path in sorted(folder.iterdir()):
            for pattern, table in ((_MODEL_FILE, self.models), (_OPTIMIZER_FILE, self.optimizers)):
                if match := pattern.fullmatch(path.name):
                    self._add(path, match, table)

    def _add(self, path: Path, match: re.Match[str], table: dict[int, Path]) -> None:
        if int(match[2]):
            raise CheckpointError(
                f"{path} is of tensor or pipeline parallelism, which this command does not join; "
                "join the ranks with the program that trained the model."
            )
        if match[1] is None:
            self.whole = path
        elif (rank := int(match[1])) in table:
            raise CheckpointError(
                f"{table[rank]} and {path} are both of rank {rank}: files of two saves; move the "
                "older ones away."
            )
        else:
            table[rank] = path

    def load(self, paths: dict[int, Path], num_ranks: int, kind: str) -> list[Any]:
        """Return the content of these files, one a rank.

        Raises:
            CheckpointError: if a rank has none, or there are files of more ranks.
        """
        missing = [str(rank) for rank in range(num_ranks) if rank not in paths]
        if missing:
            raise CheckpointError(
                f"{self.folder} is incomplete: {num_ranks} ranks wrote it, and the "
                f"*_{kind}_states.pt of rank {', '.join(missing)} "
                "is not there; copy the files of every node into the folder."
            )
        for rank in paths.keys() - range(num_ranks):
            raise CheckpointError(
                f"{paths[rank]} does not belong to a checkpoint of {num_ranks} ranks; it is left "
                "from another save: move it away."
            )
        return [load_restricted(paths[rank]) for rank in range(num_ranks)]


def _open(files: _RankFiles) -> ForeignCheckpoint:
    first = files.whole or min(files.models.items(), default=(0, None))[1]
    if first is None:
        raise CheckpointError(
            f"{files.folder} holds no *mp_rank_00_model_states.pt, which names the parameters; "
            "copy it from where the checkpoint was written."
        )
    model = load_restricted(first)
    if not model["param_shapes"]:
        raise CheckpointError(f"{first} was written without ZeRO; expected ZeRO-1, 2 or 3.")
    num_ranks = int(model["dp_world_size"])
    models = [model]
    if files.whole is None:
        models = files.load(files.models, num_ranks, "model")
        model = models[0]
    steps = {int(other["global_steps"]) for other in models}
    if len(steps) > 1:
        raise CheckpointError(
            f"{files.folder} mixes files of steps {', '.join(map(str, sorted(steps)))}; copy it "
            "again from where it was written."
        )
    shared = dict(model["shared_params"])
    trained, layout = _trained(files, model, num_ranks)
    frozen: _Parameters
    if files.whole is None:
        frozen = _Fragments(models, files)
    else:
        skipped = {*trained.shapes, *shared, *model["buffer_names"]}
        frozen = _Whole({k: v for k, v in model["module"].items() if k not in skipped})
    # None: left out on request, or ZeRO-1, which does not tell
    has_frozen = model["frozen_param_shapes"] is not None
    version = str(model.get("ds_version"))
    return ForeignCheckpoint(
        files.folder, layout, steps.pop(), version, trained, frozen, has_frozen, shared
    )


def _trained(files: _RankFiles, model: Any, num_ranks: int) -> tuple[_Parameters, str]:
    """Return the parameters that the optimizer holds, and the layout in words."""
    groups = [
        {name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]
    ]
    if not files.optimizers:
        return _Universal(files.folder / "zero", groups), "universal form"
    optimizers = [
        content["optimizer_state_dict"]
        for content in files.load(files.optimizers, num_ranks, "optim")
    ]
    paths = [files.optimizers[rank] for rank in range(num_ranks)]
    for path, optimizer in zip(paths, optimizers, strict=True):
        counts = optimizer["partition_count"]
        if max(counts if isinstance(counts, list) else [counts]) != num_ranks:
            raise CheckpointError(
                f"{path} is one of {counts} ranks, the model files of {num_ranks}: files of two "
                "saves."
            )
    if files.whole is None:
        flats = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
        return _FlatGroups(groups, flats, paths), f"ZeRO-3 on {num_ranks} ranks"
    return _Slices(groups, optimizers, files.folder), f"ZeRO-1 or 2 on {num_ranks} ranks"


def _own(numel: int, num_ranks: int, rank: int) -> int:
    """Return how many elements of a parameter ZeRO-3 gives to a rank, without the padding."""
    share = math.ceil(numel / num_ranks)
    return min(share, max(0, numel - rank * share))


@dataclass
class _FlatGroups:
    """What ZeRO-3 trains."""

    groups: Sequence[Shapes]
    ranks: Sequence[Sequence[torch.Tensor]]
    paths: Sequence[Path]
    shapes: Shapes = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._starts: dict[str, int] = {}
        end = 0
        for group in self.groups:
            for name, shape in group.items():
                self.shapes[name], self._starts[name] = shape, end
                end += math.ceil(math.prod(shape) / len(self.ranks))
        for path, flats in zip(self.paths, self.ranks, strict=True):
            if (total := sum(flat.numel() for flat in flats)) != end:
                raise CheckpointError(
                    f"{path} holds {total} elements, expected {end} of {len(self.ranks)} ranks; it "
                    "is of another save, or its master weights were offloaded to a disk."
                )

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a parameter rank by rank; it may continue in the next group of a rank."""
        numel = math.prod(self.shapes[name])
        for rank, flats in enumerate(self.ranks):
            start, count = self._starts[name], _own(numel, len(self.ranks), rank)
            for flat in flats:
                piece = flat.detach()[start : start + count]
                if piece.numel():
                    yield piece
                count -= piece.numel()
                start = max(0, start - flat.numel())


@dataclass
class _Slices:
    """What ZeRO-1 and 2 train."""

    groups: Sequence[Shapes]
    ranks: Sequence[Mapping[str, Any]]
    folder: Path
    shapes: Shapes = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._places: dict[str, list[tuple[torch.Tensor, int, int]]] = {}
        for rank in self.ranks:
            flats, mappings = rank["single_partition_of_fp32_groups"], rank["param_slice_mappings"]
            for flat, mapping in zip(flats, mappings, strict=True):
                for name, place in mapping.items():
                    end = place.start + place.numel
                    self._places.setdefault(name, []).append((flat.detach(), place.start, end))
        for group in self.groups:
            self.shapes |= group
        without = sorted(self.shapes.keys() - self._places)
        if without:
            raise CheckpointError(f"{self.folder}: no rank holds elements of {without[0]}.")

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a parameter rank by rank."""
        for flat, start, end in self._places[name]:
            yield flat[start:end]


@dataclass
class _Universal:
    """What the universal form holds: a file for each parameter."""

    folder: Path
    groups: Sequence[Shapes]
    shapes: Shapes = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.groups:
            self.shapes |= group
        missing = [name for name in self.shapes if not (self.folder / name / "fp32.pt").is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder.parent} is incomplete: there are neither *_optim_states.pt nor "
                f"{self.folder / missing[0] / 'fp32.pt'} ({len(missing)} of {len(self.shapes)} "
                "parameters are missing); copy it again, or repeat ds_to_universal."
            )

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a parameter as a whole."""
        content = load_restricted(self.folder / name / "fp32.pt")
        whole = content["param"] if isinstance(content, dict) else content
        yield whole.detach().reshape(-1)


class _Fragments:
    """What ZeRO-3 does not train."""

    def __init__(self, models: Sequence[Any], files: _RankFiles) -> None:
        self.shapes: Shapes = {
            name: tuple(shape) for name, shape in (models[0]["frozen_param_shapes"] or {}).items()
        }
        self._ranks = [model["frozen_param_fragments"] or {} for model in models]
        for rank, fragments in enumerate(self._ranks):
            if self.shapes.keys() - fragments:
                name = min(self.shapes.keys() - fragments)
                raise CheckpointError(f"{files.models[rank]} holds no part of {name}.")

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a parameter rank by rank."""
        numel = math.prod(self.shapes[name])
        for rank, fragments in enumerate(self._ranks):
            if count := _own(numel, len(self._ranks), rank):
                yield fragments[name].detach().reshape(-1)[:count]


class _Whole:
    """What ZeRO-1 and 2 do not train."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._tensors = tensors

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a parameter as a whole."""
        yield self._tensors[name].detach().reshape(-1)
