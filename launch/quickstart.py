"""The whole job in one command: draw documents, build shards, train two stages, export, score.

    python -m launch.quickstart            # or: make quickstart
    python -m launch.quickstart --fresh    # from the beginning

The tiny base model reads dark print on light paper; the documents drawn here are light on dark, in
a face that it never saw. Nothing is downloaded. Interrupted, it goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from data_tools.errors import run_command
from launch.chain import run_stage
from launch.process import ROOT, python, run
from train.config import load_config

FOLDER = Path("runs/quickstart")
BASE = "models/tiny-base"
CONFIGS = ("configs/quickstart/stage1.yaml", "configs/quickstart/stage2.yaml")
NUM_PAGES, NUM_EVALUATED, SEED, RANKS = 400, 300, 0, 2


def quickstart(is_fresh: bool) -> Path:
    """Run what is missing of the quickstart and return its summary."""
    summary = FOLDER / "summary.json"
    if is_fresh and FOLDER.exists():
        shutil.rmtree(FOLDER)
    if summary.exists():
        print(f"{summary}: done already (FRESH=1 starts anew)", file=sys.stderr)
        return summary
    FOLDER.mkdir(parents=True, exist_ok=True)
    start_s = time.monotonic()
    pages, shards = FOLDER / "data" / "pages", FOLDER / "data" / "shards"
    drawing = ("--num", str(NUM_PAGES), "--seed", str(SEED), "--style", "inverted")
    run(python("-m", "data_tools.synth", str(pages), *drawing))
    run(python("-m", "data_tools.build", str(pages), str(shards), "--unit", "line"))

    reports = [_score("before", BASE, shards)]
    for number, config in enumerate(CONFIGS, start=1):
        hf_dir = run_stage(config, RANKS, [])
        reports.append(_score(f"stage{number}", hf_dir, shards))
    content = _summary(reports, hf_dir) | {"wall_s": round(time.monotonic() - start_s, 1)}
    temporary = summary.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, summary)
    return summary


def _score(name: str, hf_dir: str, shards: Path) -> dict[str, Any]:
    """Read the held-out lines with a model folder, once, and return the report."""
    report = FOLDER / "scores" / f"{name}.json"
    if not report.exists():
        report.parent.mkdir(exist_ok=True)
        limits = ("--num", str(NUM_EVALUATED), "--seed", str(SEED), "--max-new-tokens", "48")
        patterns = str(shards / "val-*.tar")
        options = ("--template", "text-plain", "--device", "cpu", "--json", str(report), *limits)
        run(python("-m", "inference.evaluate", hf_dir, patterns, *options))
    return json.loads(report.read_text(encoding="utf-8"))


def _summary(reports: list[dict[str, Any]], hf_dir: str) -> dict[str, Any]:
    before, stage1, stage2 = (report["text"]["cer"]["micro"]["value"] for report in reports)
    return {
        "cer_before": before,
        "cer_stage1": stage1,
        "cer_stage2": stage2,
        "num_samples": reports[-1]["text"]["num_documents"],
        "world_size": RANKS,
        "zero_stage": load_config(CONFIGS[0]).parallel.zero_stage,
        "hf_dir": hf_dir,
        "tensorboard_dir": str(FOLDER),
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table, the folder and what to type next."""
    print(f"\nCER on {summary['num_samples']} held-out lines (light print, a face never seen)\n")
    for label, key in (("before", "before"), ("stage 1", "stage1"), ("stage 2", "stage2")):
        print(f"  {label:<10} {summary[f'cer_{key}']:.3f}")
    print(f"\nHugging Face folder   {summary['hf_dir']}")
    print(f"TensorBoard           .venv/bin/tensorboard --logdir {summary['tensorboard_dir']}")


def main() -> None:
    """Run the quickstart and show its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="delete runs/quickstart first")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    # Two ranks of a tiny model: the same on a machine with one GPU, with eight, or with none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    show(json.loads(quickstart(arguments.fresh).read_text(encoding="utf-8")))


if __name__ == "__main__":
    run_command(main)
