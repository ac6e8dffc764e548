"""Turn a checkpoint into a Hugging Face folder that transformers and vLLM read.

    python -m train.export RUN/stage2                    # newest valid step -> RUN/stage2/hf
    python -m train.export RUN/stage2 --out HF_DIR --step 1200 --dtype bf16
    python -m train.export RUN/stage2 --out HF_DIR --max-shard-gb 2 --workers 4 --force
    python -m train.export RUN/stage2 --average 5        # the mean of the last 5 checkpoints
    python -m train.export RUN/stage2 --average 5 --ema 0.8

Needs no GPU and a few MiB of memory for a model of any size, and may run beside the training.
Interrupted and typed again it goes on with the next weight file; finished, it says that it is done.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from data_tools.errors import CheckpointError, LecternError, run_command
from train.checkpoint.hub import check_weights, write_weights
from train.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    find_checkpoint,
    fsync_folder,
    list_checkpoints,
    read_manifest,
    verify,
    write_text,
)
from train.checkpoint.weights import Origin, TrainedWeights, average_shares
from train.model_card import model_card
from train.modeling.names import hub_name
from train.status import read_status

Files = dict[str, dict[str, str]]  # file name -> hub name -> sha256 of the tensor's bytes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MARKER_FILE = "export.json"
TEMPLATE_FILE = "template.yaml"
READER_FILE = "lectern.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
RELOAD_LIMIT_BYTES = 50 * 10**6  # of weights; above it the files are checked, no model is loaded
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


def export(
    stage: Path,
    out: Path | None = None,
    *,
    steps: list[int] | None = None,
    average: int = 1,
    ema: float | None = None,
    dtype: str = "bf16",
    max_shard_gb: float = 5.0,
    workers: int = 1,
    force: bool = False,
) -> Path:
    """Write the Hugging Face folder of a checkpoint of `stage`; return the folder.

    Args:
        stage: RUN/stageN, with config.yaml and checkpoints/.
        out: the new folder, RUN/stageN/hf by default; complete or not there at all.
        steps: of the checkpoint, or of those to average; the newest valid one by default.
        average: so many of the newest checkpoints are averaged, where `steps` names none.
        ema: weight of each checkpoint relative to the next newer one; None: all alike.
        dtype: "bf16", "fp16" or "fp32".
        max_shard_gb: largest weight file, in 10^9 bytes.
        workers: processes that write weight files.
        force: replace what `out` holds.

    Raises:
        CheckpointError: if something is missing or damaged, or `out` holds something else.
    """
    out = out or stage / "hf"
    config = _read_config(stage)
    checkpoints = _find_checkpoints(stage / "checkpoints", steps, average)
    origin = _origin(config, checkpoints, average_shares(len(checkpoints), ema))
    manifest = read_manifest(checkpoints[-1])
    marker = _marker(checkpoints, origin, dtype)
    what = f"step {', '.join(map(str, marker['steps']))} in {dtype}"

    def fill(folder: Path) -> Files:
        files = write_weights(folder, origin, DTYPES[dtype], int(max_shard_gb * 10**9), workers)
        _write_side_files(folder, stage, config, manifest, marker, out)
        shapes = TrainedWeights(origin).shapes()
        check_weights(folder, shapes, DTYPES[dtype], files, workers)
        return files

    about = {"stage": str(stage)}
    return build_folder(out, marker, about, f"{what} of {stage}", fill, max_shard_gb, force)


def build_folder(
    out: Path,
    marker: dict[str, Any],
    about: dict[str, Any],
    what: str,
    fill: Callable[[Path], Files],
    max_shard_gb: float,
    force: bool,
) -> Path:
    """Make a Hugging Face folder that is complete or not there at all; return it.

    Args:
        out: the new folder.
        marker: what it is made of, with its `dtype`; a folder with the same marker is done.
        about: more for the marker's file.
        what: the same in words.
        fill: writes everything into a folder and returns `write_weights`' table. An earlier try
            that was interrupted may have left finished weight files there.
        max_shard_gb: largest weight file, in 10^9 bytes.
        force: replace what `out` holds.

    Raises:
        CheckpointError: from `fill`, or if `out` holds something else, or transformers loads the
            folder differently.
    """
    if _is_done(out, marker):
        print(f"{out} is done already ({what}).", file=sys.stderr)
        return out
    if not force and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} holds something else than {what}; "
            "choose another --out or replace it with --force."
        )
    temporary = _temporary(out, [marker, max_shard_gb])
    try:
        files = fill(temporary)
        if sum((temporary / file).stat().st_size for file in files) < RELOAD_LIMIT_BYTES:
            _check_by_loading(temporary, DTYPES[marker["dtype"]], list(files))
    except LecternError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    text = json.dumps({**marker, **about, "files": files}, indent=2)
    write_text(temporary / MARKER_FILE, text + "\n")
    fsync_folder(temporary)
    _put_in_place(temporary, out)
    print(f"{out}: {what}, {len(files)} weight file(s).", file=sys.stderr)
    return out


def _temporary(out: Path, origin: list[Any]) -> Path:
    """Return the folder in which the same export is written, in this try or an earlier one."""
    name = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    temporary = out.with_name(f".tmp-{out.name}-{name}")
    temporary.mkdir(parents=True, exist_ok=True)
    return temporary


def _find_checkpoints(folder: Path, steps: list[int] | None, average: int) -> tuple[Path, ...]:
    """Return the checkpoints that are wanted, oldest first."""
    if steps:
        return tuple(find_checkpoint(folder, step) for step in sorted(set(steps)))
    if average == 1:
        return (find_checkpoint(folder),)
    whole = [path for _, path in list_checkpoints(folder) if not verify(path)]
    if len(whole) < average:
        raise CheckpointError(
            f"{folder}: --average {average}, but there are {len(whole)} whole checkpoints; keep "
            "more of them with checkpoint.keep_last or keep_every."
        )
    return tuple(whole[-average:])


def _marker(checkpoints: tuple[Path, ...], origin: Origin, dtype: str) -> dict[str, Any]:
    """Return what an export is made of: two with the same marker are the same."""
    manifests = [(path / MANIFEST_FILE).read_bytes() for path in checkpoints]
    return {
        "steps": [read_manifest(path).step for path in checkpoints],
        "shares": list(origin.shares),
        "dtype": dtype,
        "checkpoint_sha256": [hashlib.sha256(content).hexdigest() for content in manifests],
    }


def best_step(stage: Path) -> int:
    """Return the step that early stopping found best.

    Raises:
        CheckpointError: if the stage ran without early stopping or was never evaluated.
    """
    step = read_status(stage).get("best_step")
    if not step:
        raise CheckpointError(
            f"{stage}/status.json names no best step; set stage.early_stopping to have one, or "
            "export the newest checkpoint without --best"
        )
    return int(step)


def _read_config(stage: Path) -> dict[str, Any]:
    path = stage / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: expected a stage of a run, RUN/stageN.")
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    folder = Path(config["model"]["path"])
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{path}: model.path is {folder}, which is no Hugging Face folder here (no "
            "config.json); the export needs the folder that the training started from."
        )
    return config


def _origin(
    config: dict[str, Any], checkpoints: tuple[Path, ...], shares: tuple[float, ...]
) -> Origin:
    model = config["model"]
    folder = Path(model["path"])
    adapter = model.get("adapter")
    return Origin(
        checkpoints,
        shares,
        base=None if model.get("init") == "scratch" else folder,
        tied=is_tied(folder),
        adapter_scale=adapter["alpha"] / adapter["rank"] if adapter else None,
    )


def is_tied(folder: Path) -> bool:
    """Tell whether a model folder's head is its embedding, so that no file holds it."""
    settings = _read_json(folder / "config.json")
    nested = settings.get("text_config", {}).get("tie_word_embeddings", False)
    return bool(settings.get("tie_word_embeddings", False) or nested)


def _is_done(out: Path, marker: dict[str, Any]) -> bool:
    """Tell whether `out` is a whole export of the same checkpoints in the same dtype."""
    try:
        found = _read_json(out / MARKER_FILE)
    except (OSError, ValueError):
        return False
    same = all(found.get(key) == value for key, value in marker.items())
    return same and all((out / file).is_file() for file in found.get("files", {}))


def _put_in_place(temporary: Path, out: Path) -> None:
    old = out.with_name(f".tmp-del-{out.name}-{uuid.uuid4().hex[:8]}")
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    fsync_folder(out.parent)
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()


def _write_side_files(
    folder: Path,
    stage: Path,
    config: dict[str, Any],
    manifest: Manifest,
    marker: dict[str, Any],
    out: Path,
) -> None:
    """Write everything but the weights: settings, tokenizer, processor, model card."""
    from train.config import reader_settings

    base = Path(config["model"]["path"])
    copy_base_files(base, folder, DTYPES[marker["dtype"]])
    reader = reader_settings(config)
    if Path(reader["template"]).is_file():  # the user's own: the folder must be readable elsewhere
        shutil.copyfile(reader["template"], folder / TEMPLATE_FILE)
        reader["template"] = TEMPLATE_FILE
    if (folder / PREPROCESSOR_FILE).exists():
        _set_pixel_limits(folder / PREPROCESSOR_FILE, reader["min_pixels"], reader["max_pixels"])
    _write_json(folder / READER_FILE, reader)
    write_text(folder / "README.md", model_card(stage, config, manifest, marker, out.name))


def copy_base_files(base: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy settings, tokenizer and processor of a model folder; config.json names `dtype`."""
    for pattern in COPIED:
        for path in base.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    settings = _read_json(base / "config.json")
    _set_dtype(settings, str(dtype).removeprefix("torch."))
    _write_json(folder / "config.json", settings)


def _set_dtype(settings: dict[str, Any], name: str) -> None:
    """Change the dtype where a config.json names one; in its flat form it is `torch_dtype`."""
    if "dtype" not in settings:
        settings["torch_dtype"] = name
    for part in (settings, settings.get("text_config"), settings.get("vision_config")):
        for key in ("torch_dtype", "dtype"):
            if part and key in part:
                part[key] = name


def _set_pixel_limits(path: Path, min_pixels: int, max_pixels: int) -> None:
    processor = _read_json(path)
    processor |= {"min_pixels": min_pixels, "max_pixels": max_pixels}
    if "size" in processor:  # the newer spelling, which wins over the older one
        processor["size"] = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    _write_json(path, processor)


def _check_by_loading(folder: Path, dtype: torch.dtype, files: list[str]) -> None:
    """Load the folder with transformers and compare every tensor with the files."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    answer: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    model, info = answer
    logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = sorted(map(str, info[kind]))[:3]
            raise CheckpointError(f"{folder}: transformers reports {kind}: {names}.")
    loaded = {hub_name(name): parameter for name, parameter in model.named_parameters()}
    for file in files:
        for name, tensor in load_file(folder / file).items():
            if not torch.equal(loaded.pop(name), tensor):
                raise CheckpointError(f"{folder}: transformers loads other values of {name}.")
    if loaded:
        raise CheckpointError(f"{folder}: no file holds {min(loaded)}.")


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description="Turn a checkpoint into a Hugging Face folder.",
    )
    parser.add_argument("stage", type=Path, help="RUN/stageN")
    parser.add_argument("--out", type=Path, help="the new folder (default: RUN/stageN/hf)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step",
        type=int,
        action="append",
        dest="steps",
        help="default: the newest valid one; given several times, these are averaged",
    )
    which.add_argument("--average", type=int, default=1, metavar="N", help="of the N newest ones")
    which.add_argument("--best", action="store_true", help="the best step under early stopping")
    parser.add_argument(
        "--ema",
        type=float,
        help="of an average: weight of each checkpoint relative to the next newer one, as 0.8",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weight file, GB")
    parser.add_argument("--workers", type=int, default=1, help="processes that write and check")
    parser.add_argument("--force", action="store_true", help="replace what OUT holds")
    arguments = parser.parse_args()
    # transformers imports DeepSpeed where it is installed, which then talks about its accelerator
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    options = vars(arguments)
    if options.pop("best"):
        options["steps"] = [best_step(arguments.stage)]
    export(**options)


if __name__ == "__main__":
    run_command(main)
