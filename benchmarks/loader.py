"""Measure how fast pages become pixels, ours beside others', and how well packs are planned.

    python -m benchmarks.loader                              synthetic receipts
    python -m benchmarks.loader --receipts DIR --pages 64    real ones: DIR holds a labels.jsonl
    python -m benchmarks.loader --json

Without --receipts, DIR is $LECTERN_SHARED/sroie if there is one. Images per second and core: CPU
time of one thread, all contenders interleaved in one process. Equality with the processors of
transformers is checked first; the command ends with 1 if it does not hold. torchvision and
Megatron-Energon come from `make bench-env`; what is missing is said, the rest is measured.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.loading import environment
from data_tools.errors import ConfigError, run_command

if TYPE_CHECKING:
    from benchmarks.loading.report import Findings

EXIT_UNEQUAL = 1
NUM_MIX_SAMPLES = 200_000
PACKS_PER_STEP = 64
RANKS = 8
BUDGETS = {"8k": 8192, "16k": 16384}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse_arguments(arguments)
    environment.add_bench_env()
    import cv2
    import torch
    import transformers

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    transformers.logging.set_verbosity_error()
    from benchmarks.loading.report import to_json, to_text

    with tempfile.TemporaryDirectory(prefix="lectern-loader-") as folder:
        found = measure_all(options, Path(folder))
    print(json.dumps(to_json(found), indent=2) if options.json else to_text(found))
    return 0 if found.is_equal else EXIT_UNEQUAL


def measure_all(options: argparse.Namespace, folder: Path) -> "Findings":
    """Check equality, then measure; progress goes to stderr."""
    from benchmarks.loading.contenders import contenders_for
    from benchmarks.loading.equality import max_difference, queue_bytes
    from benchmarks.loading.pages import make_page_sets
    from benchmarks.loading.planning import draw_mix, plan_mix
    from benchmarks.loading.report import Findings
    from benchmarks.loading.sources import open_source, planning_s_per_sample
    from benchmarks.loading.timing import measure

    sets = [(p, open_source(p)) for p in make_page_sets(folder, options.receipts, options.pages)]
    _say("equality of the pixels")
    diffs: dict[str, float | None] = {
        "exact": max(max_difference(pages, source, "exact") for pages, source in sets),
        "fast": None,
    }
    if environment.has_torchvision():
        diffs["fast"] = max(max_difference(pages, source, "fast") for pages, source in sets)
    theirs, ours = (sum(p) for p in zip(*(queue_bytes(*pair) for pair in sets), strict=True))
    timings, planning_s, loading_s = {}, 0.0, 0.0
    for pages, source in sets:
        _say(f"{options.rounds} rounds over {pages.num_pages} pages, {pages.name}")
        timings[pages.name] = measure(contenders_for(pages, source), options.rounds)
        planning_s += planning_s_per_sample(source) * pages.num_pages
        loading_s += timings[pages.name]["exact"].median_s
    _say(f"planning {options.samples} samples of the mix")
    mix = draw_mix(options.samples)
    return Findings(
        pages=[pages for pages, _ in sets],
        timings=timings,
        max_diff=diffs,
        queue_bytes_ratio=theirs / ours,
        plans={k: plan_mix(*mix, budget, PACKS_PER_STEP, RANKS) for k, budget in BUDGETS.items()},
        plan_share=planning_s / loading_s,
        rounds=options.rounds,
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: if a number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--receipts", type=Path, metavar="DIR", help="annotated receipts")
    parser.add_argument("--pages", type=int, default=32, metavar="N", help="of each page set (32)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of timing (5)")
    parser.add_argument(
        "--samples",
        type=int,
        default=NUM_MIX_SAMPLES,
        metavar="N",
        help=f"of the mix that is planned ({NUM_MIX_SAMPLES})",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON record")
    options = parser.parse_args(arguments)
    if min(options.pages, options.rounds, options.samples) < 1:
        raise ConfigError("--pages, --rounds and --samples must be at least 1")
    options.receipts = options.receipts or default_receipts()
    return options


def default_receipts() -> Path | None:
    """Return $LECTERN_SHARED/sroie if that is a folder."""
    shared = os.environ.get("LECTERN_SHARED")
    folder = Path(shared or "") / "sroie"
    return folder if shared and folder.is_dir() else None


def _say(text: str) -> None:
    print(f"loader: {text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
