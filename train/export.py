"""Turn a checkpoint into a Hugging Face folder that transformers and vLLM read.

    python -m train.export RUN/stage2                    # newest valid step -> RUN/stage2/hf
    python -m train.export RUN/stage2 --out HF_DIR --step 1200 --dtype bf16
    python -m train.export RUN/stage2 --out HF_DIR --max-shard-gb 2 --force

Needs neither a GPU nor the memory for the model, and may run beside the training. Typed again it
says that it is done.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from data_tools.errors import CheckpointError, run_command
from train.checkpoint.hub import BaseWeights, WeightSource, check_weights, write_weights
from train.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    find_checkpoint,
    fsync_folder,
    read_manifest,
    write_text,
)
from train.checkpoint.shards import SliceReader
from train.modeling.names import hub_name
from train.status import read_status

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MARKER_FILE = "export.json"
TEMPLATE_FILE = "template.yaml"
READER_FILE = "lectern.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
RELOAD_LIMIT_BYTES = 2 * 10**9  # above it the files are checked, the class is not loaded
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
    step: int | None = None,
    dtype: str = "bf16",
    max_shard_gb: float = 5.0,
    force: bool = False,
) -> Path:
    """Write the Hugging Face folder of a checkpoint of `stage`; return the folder.

    Args:
        stage: RUN/stageN, with config.yaml and checkpoints/.
        out: the new folder, RUN/stageN/hf by default; complete or not there at all.
        step: of the checkpoint; the newest valid one by default.
        dtype: "bf16", "fp16" or "fp32".
        max_shard_gb: largest weight file, in 10^9 bytes.
        force: replace what `out` holds.

    Raises:
        CheckpointError: if something is missing or damaged, or `out` holds something else.
    """
    out = out or stage / "hf"
    config = _read_config(stage)
    checkpoint = find_checkpoint(stage / "checkpoints", step)
    manifest = read_manifest(checkpoint)
    digest = hashlib.sha256((checkpoint / MANIFEST_FILE).read_bytes()).hexdigest()
    origin = {"step": manifest.step, "dtype": dtype, "checkpoint_sha256": digest}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _is_done(out, origin):
            print(f"{out} is done already (step {manifest.step}, {dtype}).", file=sys.stderr)
            return out
        if not force:
            raise CheckpointError(
                f"{out} holds something else than step {manifest.step} in {dtype} of {stage}; "
                "choose another --out or replace it with --force."
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        source = _open_source(config, checkpoint, manifest)
        files = write_weights(temporary, source, DTYPES[dtype], int(max_shard_gb * 10**9))
        _write_side_files(temporary, stage, config, manifest, dtype, out)
        check_weights(temporary, source.shapes(), DTYPES[dtype], files)
        if sum((temporary / file).stat().st_size for file in files) < RELOAD_LIMIT_BYTES:
            _check_by_loading(temporary, DTYPES[dtype], list(files))
        marker = json.dumps({**origin, "stage": str(stage), "files": files}, indent=2)
        write_text(temporary / MARKER_FILE, marker + "\n")
        fsync_folder(temporary)
        _put_in_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"{out}: step {manifest.step}, {dtype}, {len(files)} weight file(s).", file=sys.stderr)
    return out


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


def _open_source(config: dict[str, Any], checkpoint: Path, manifest: Manifest) -> WeightSource:
    model = config["model"]
    folder = Path(model["path"])
    settings = _read_json(folder / "config.json")
    nested = settings.get("text_config", {}).get("tie_word_embeddings", False)
    adapter = model.get("adapter")
    return WeightSource(
        manifest=manifest,
        reader=SliceReader(checkpoint, manifest),
        base=BaseWeights(None if model.get("init") == "scratch" else folder),
        tied=settings.get("tie_word_embeddings", False) or nested,
        adapter_scale=adapter["alpha"] / adapter["rank"] if adapter else None,
    )


def _is_done(out: Path, origin: dict[str, Any]) -> bool:
    """Tell whether `out` is a whole export of the same checkpoint and dtype."""
    try:
        marker = _read_json(out / MARKER_FILE)
    except (OSError, ValueError):
        return False
    same = all(marker.get(key) == value for key, value in origin.items())
    return same and all((out / file).is_file() for file in marker.get("files", {}))


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
    folder: Path, stage: Path, config: dict[str, Any], manifest: Manifest, dtype: str, out: Path
) -> None:
    """Write everything but the weights: settings, tokenizer, processor, model card."""
    from train.config import reader_settings

    base = Path(config["model"]["path"])
    for pattern in COPIED:
        for path in base.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    reader = reader_settings(config)
    if Path(reader["template"]).is_file():  # the user's own: the folder must be readable elsewhere
        shutil.copyfile(reader["template"], folder / TEMPLATE_FILE)
        reader["template"] = TEMPLATE_FILE
    if (folder / PREPROCESSOR_FILE).exists():
        _set_pixel_limits(folder / PREPROCESSOR_FILE, reader["min_pixels"], reader["max_pixels"])
    settings = _read_json(base / "config.json")
    _set_dtype(settings, str(DTYPES[dtype]).removeprefix("torch."))
    _write_json(folder / "config.json", settings)
    _write_json(folder / READER_FILE, reader)
    write_text(folder / "README.md", model_card(stage, config, manifest, dtype, out))


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


def model_card(
    stage: Path, config: dict[str, Any], manifest: Manifest, dtype: str, out: Path
) -> str:
    """Return the README.md of an exported folder."""
    base = config["model"]["path"]
    trained = sum(1 for about in manifest.parameters.values() if about["trainable"])
    try:
        metrics = _read_json(stage / "status.json").get("metrics") or {}
    except (OSError, ValueError):
        metrics = {}
    rows = [f"| {k} | {v} |" for k, v in metrics.items() if isinstance(v, int | float | str)]
    measured = ["## Metrics", "", "| metric | value |", "| --- | --- |", *rows, ""] if rows else []
    settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    libraries = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: image-text-to-text",
            "---",
            f"# {out.resolve().name}",
            "",
            f"Qwen2.5-VL trained with Lectern to read documents: `{stage}`, step {manifest.step}, "
            f"started from `{base}`.",
            f"{trained} of {len(manifest.parameters)} parameter tensors were trained; weights are "
            f"stored in {dtype}. Written with {libraries}. The licence of the base model applies.",
            "",
            *measured,
            "## Read an image",
            "",
            "```bash",
            f"python -m inference.predict {out} page.png",
            "```",
            "",
            f"Image transforms, pixel limits and task are in `{READER_FILE}`; the command above "
            "applies them. Any program for Qwen2.5-VL reads the folder as it is:",
            "",
            "```python",
            "from transformers import Qwen2_5_VLForConditionalGeneration",
            "",
            f'model = Qwen2_5_VLForConditionalGeneration.from_pretrained("{out}", dtype="auto")',
            "```",
            "",
            "## Serve with vLLM",
            "",
            "```bash",
            f"vllm serve {out} --limit-mm-per-prompt '{{\"image\": 4}}'",
            "```",
            "",
            "## Configuration",
            "",
            "```yaml",
            settings.rstrip(),
            "```",
            "",
        ]
    )


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
    which.add_argument("--step", type=int, help="default: the newest valid one")
    which.add_argument("--best", action="store_true", help="the best step under early stopping")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weight file, GB")
    parser.add_argument("--force", action="store_true", help="replace what OUT holds")
    arguments = parser.parse_args()
    # transformers imports DeepSpeed where it is installed, which then talks about its accelerator
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    options = vars(arguments)
    if options.pop("best"):
        options["step"] = best_step(arguments.stage)
    export(**options)


if __name__ == "__main__":
    run_command(main)
