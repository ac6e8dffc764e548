"""Turn a checkpoint that DeepSpeed wrote for another trainer into a Hugging Face folder.

    python -m train.convert_deepspeed CHECKPOINT --model BASE --out HF_DIR
    python -m train.convert_deepspeed CHECKPOINT --model BASE --out HF_DIR --tag global_step500
    python -m train.convert_deepspeed CHECKPOINT --model BASE --out HF_DIR --dtype fp32 --force

CHECKPOINT is what `save_checkpoint` wrote under ZeRO-1, 2 or 3, or what `ds_to_universal` made of
it, of a Qwen2.5-VL; BASE is the folder that the training started from. Needs neither DeepSpeed nor
a GPU, and a few MiB of memory beside the mapped files. Nothing in the checkpoint is executed.
Interrupted and typed again it goes on with the next weight file; finished, it says so.
"""

import argparse
import math
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.errors import CheckpointError, run_command
from train.checkpoint.foreign import ForeignCheckpoint, open_foreign
from train.checkpoint.hub import check_weights, write_weights
from train.checkpoint.manifest import write_text
from train.checkpoint.weights import BLOCK_ELEMENTS, HEAD, BaseWeights
from train.export import DTYPES, Files, build_folder, copy_base_files, is_tied
from train.modeling.names import hub_name, is_adapter, memory_name

COMPILED = "_orig_mod."  # what torch.compile puts before the names of a module, anywhere

README = """---
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

Qwen2.5-VL, converted by Lectern from a checkpoint of DeepSpeed {version}: `{folder}`, step {step},
{layout}. {tensors} Weights are stored in {dtype}.

Settings, tokenizer and processor are those of `{base}`, whose licence applies. How the model was
trained is not recorded in the checkpoint.
"""


@dataclass(frozen=True)
class ForeignOrigin:
    """Where converted weights come from; plain values that another process can open.

    Attributes:
        checkpoint: the folder with `latest`, or that of one save.
        model: the Hugging Face folder that the training started from.
        tag: of the save.
        prefix: of the parameter names.
    """

    checkpoint: Path
    model: Path
    tag: str | None
    prefix: str | None

    def open(self) -> "ForeignWeights":
        """Open the files; CheckpointError if they are not of the same model."""
        base, source = _open_base(self.model), open_foreign(self.checkpoint, self.tag)
        return ForeignWeights(source, base, is_tied(self.model), self.prefix)


class ForeignWeights:
    """Every weight of a Qwen2.5-VL under its hub name, from a foreign checkpoint and a base.

    Raises:
        CheckpointError: if the checkpoint is not of the same model as the base.
    """

    def __init__(
        self, checkpoint: ForeignCheckpoint, base: BaseWeights, tied: bool, prefix: str | None
    ) -> None:
        self.checkpoint, self.base = checkpoint, base
        shapes = checkpoint.shapes
        wanted = base.names - {HEAD} if tied else base.names
        known = wanted | {HEAD}
        names = match_names({*shapes, *checkpoint.shared}, known, prefix)
        self.sources = {names[name]: name for name in shapes}
        for other, stored in checkpoint.shared.items():
            if stored in shapes:
                self.sources.setdefault(names[other], stored)
        if tied:
            self._drop_head({names[other] for other in checkpoint.shared})
        self._check(wanted)
        self.from_base = sorted(wanted - self.sources.keys())

    def _drop_head(self, shared: set[str]) -> None:
        head = self.sources.pop(HEAD, None)
        embedding = memory_name("model.embed_tokens.weight")
        if head is not None and not shared & {HEAD, embedding}:
            raise CheckpointError(
                f"{self.checkpoint.folder} holds a head of its own ({head}), but in the "
                f"config.json of {self.base.folder} tie_word_embeddings is true; give --model a "
                "folder of the untied model."
            )

    def _check(self, wanted: Collection[str]) -> None:
        unknown = sorted(self.sources.keys() - wanted)
        if unknown:
            raise CheckpointError(
                f"{self.base.folder} has no {unknown[0]}, which {self.checkpoint.folder} holds "
                f"({len(unknown)} such parameters); is --model the folder it was trained from?"
            )
        missing = sorted(set(wanted) - self.sources.keys())
        if missing and self.checkpoint.has_frozen:
            raise CheckpointError(
                f"{self.checkpoint.folder} holds no {missing[0]} ({len(missing)} parameters of "
                f"{self.base.folder} are missing); is --model the folder it was trained from?"
            )
        shapes = self.checkpoint.shapes
        for name, source in self.sources.items():
            if shapes[source] != (expected := self.base.shape(name)):
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {source} has shape {list(shapes[source])}, in "
                    f"{self.base.folder} {list(expected)}; is --model the folder it was trained "
                    "from?"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return hub name -> shape, in the order in which the checkpoint is read."""
        names = [*self.sources, *self.from_base]
        return {hub_name(name): self.base.shape(name) for name in names}

    def describe(self) -> str:
        """Return a sentence on where the parameters come from."""
        stored, others = len(self.sources), len(self.from_base)
        if not others:
            return f"All {stored} parameter tensors come from the checkpoint."
        return (
            f"{stored} parameter tensors come from the checkpoint, {others} that it does not hold "
            f"(frozen in the training) from `{self.base.folder}`."
        )

    def blocks(self, hub: str) -> Iterator[torch.Tensor]:
        """Yield a weight by its hub name in flat blocks in order, in the dtype it is stored in."""
        name = memory_name(hub)
        if name in self.sources:
            for piece in self.checkpoint.pieces(self.sources[name]):
                yield from piece.split(BLOCK_ELEMENTS)
            return
        numel = math.prod(self.base.shape(name))
        for start in range(0, numel, BLOCK_ELEMENTS):
            yield self.base.read(name, start, min(numel, start + BLOCK_ELEMENTS))


def match_names(
    names: Collection[str], known: Collection[str], prefix: str | None = None
) -> dict[str, str]:
    """Return for each parameter of a foreign trainer its name in memory.

    Trainers wrap the model, so that all names begin alike (`module.`, `model.`, `base_model.`).
    What to cut off is what leaves only known names; names in memory and of the hub both do.

    Args:
        names: in the checkpoint.
        known: in memory, of the base.
        prefix: to cut off; found out by default.

    Raises:
        CheckpointError: if no prefix fits or several do, or there is an adapter.
    """
    adapters = [name for name in names if is_adapter(name)]
    if adapters:
        raise CheckpointError(
            f"{min(adapters)}: the checkpoint is of an adapter (LoRA), this command needs whole "
            "weights. Load it with peft, merge it there (merge_and_unload) and save the model."
        )
    plain = {name: name.replace(COMPILED, "") for name in names}
    if prefix is None:
        common = os.path.commonprefix(list(plain.values()))
        candidates = [""] + [common[: i + 1] for i, c in enumerate(common) if c == "."]
    else:
        candidates = [prefix]
    matches = {
        candidate: {name: _without(candidate, text) for name, text in plain.items()}
        for candidate in candidates
    }
    fitting = {key: found for key, found in matches.items() if set(found.values()) <= set(known)}
    different = {tuple(sorted(found.items())): key for key, found in fitting.items()}
    if len(different) > 1:
        raise CheckpointError(
            f"the names fit with each of these prefixes cut off: {sorted(different.values())}; "
            "choose one with --prefix."
        )
    if not fitting:
        best = max(matches, key=lambda key: len(set(matches[key].values()) & set(known)))
        unknown = sorted(name for name, text in matches[best].items() if text not in known)
        raise CheckpointError(
            f"{len(unknown)} of {len(names)} parameters are none of a Qwen2.5-VL of this size, "
            f"with the prefix {best!r} cut off; for example {unknown[:3]}. Is --model the folder "
            "that it was trained from? If the prefix is wrong, give --prefix."
        )
    found = fitting[min(fitting)]
    twice = [name for name in found.values() if list(found.values()).count(name) > 1]
    if twice:
        raise CheckpointError(f"two parameters of the checkpoint are {twice[0]}; give --prefix.")
    return found


def _without(prefix: str, name: str) -> str:
    """Return the name in memory; one without the prefix stays as it is and so will be unknown."""
    return memory_name(name.removeprefix(prefix)) if name.startswith(prefix) else name


def convert(
    checkpoint: Path,
    model: Path,
    out: Path,
    *,
    tag: str | None = None,
    dtype: str = "bf16",
    max_shard_gb: float = 5.0,
    prefix: str | None = None,
    workers: int = 1,
    force: bool = False,
) -> Path:
    """Write the Hugging Face folder of a foreign checkpoint; return the folder.

    Args:
        checkpoint: the folder with `latest`, or that of one save.
        model: the Hugging Face folder that the training started from.
        out: the new folder; complete or not there at all.
        tag: of the save; the one that `latest` names by default.
        dtype: "bf16", "fp16" or "fp32".
        max_shard_gb: largest weight file, in 10^9 bytes.
        prefix: what the trainer put before the parameter names; found out by default.
        workers: processes that write and check weight files.
        force: replace what `out` holds.

    Raises:
        CheckpointError: if something is missing, damaged, of another model or not allowed, or
            `out` holds something else.
    """
    origin = ForeignOrigin(checkpoint, model, tag, prefix)
    weights = origin.open()
    source, base = weights.checkpoint, weights.base
    marker = {
        "step": source.step,
        "dtype": dtype,
        "checkpoint_sha256": source.digest(),
        "base_sha256": base.identity()["sha256"],
        "prefix": prefix,
    }
    about = {
        "folder": str(source.folder),
        "layout": source.layout,
        "version": source.version,
        "base": str(model),
        "tensors": weights.describe(),
    }

    def fill(folder: Path) -> Files:
        max_bytes = int(max_shard_gb * 10**9)
        files = write_weights(folder, origin, DTYPES[dtype], max_bytes, workers)
        copy_base_files(model, folder, DTYPES[dtype])
        readme = README.format(name=out.name, step=source.step, dtype=dtype, **about)
        write_text(folder / "README.md", readme)
        check_weights(folder, weights.shapes(), DTYPES[dtype], files, workers)
        return files

    print(weights.describe(), file=sys.stderr)
    what = f"step {source.step} in {dtype} of {source.folder} ({source.layout})"
    return build_folder(out, marker, about, what, fill, max_shard_gb, force)


def _open_base(folder: Path) -> BaseWeights:
    base = BaseWeights(folder)
    if not (folder / "config.json").is_file() or not base.names:
        raise CheckpointError(
            f"--model {folder} is no Hugging Face folder (config.json and safetensors files); give "
            "the folder that the training started from."
        )
    return base


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m train.convert_deepspeed",
        description="Turn a checkpoint of DeepSpeed into a Hugging Face folder.",
    )
    parser.add_argument("checkpoint", type=Path, help="the folder with `latest`, or of one save")
    parser.add_argument(
        "--model", type=Path, required=True, help="the folder that the training started from"
    )
    parser.add_argument("--out", type=Path, required=True, help="the new folder")
    parser.add_argument("--tag", help="of the save (default: the one that `latest` names)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weight file, GB")
    parser.add_argument(
        "--prefix", help="what the trainer put before parameter names (default: found out)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that write and check")
    parser.add_argument("--force", action="store_true", help="replace what OUT holds")
    # transformers imports DeepSpeed where it is installed, which then talks about its accelerator
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    convert(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_command(main)
