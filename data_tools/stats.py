"""How long the samples are, and how full packs of them become: choose budgets by it.

    python -m data_tools.stats SHARDS --model FOLDER
    python -m data_tools.stats SHARDS --model FOLDER --template text-en receipt-fields-en
    python -m data_tools.stats SHARDS --model FOLDER --budgets 8192,16384 --ranks 16 --png data.png

Lengths are those of the tokenizer and chat template in FOLDER, for the questions of --template and
the page size of --max-pixels. Printed are their histogram, what padded batches of 8 would waste and
what packs do, the balance over the ranks, the samples that no pack can hold, and a token budget and
a page size that suit the data, each with the rule behind it. Nothing is decoded.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import ConfigError, run_command
from data_tools.examples.encode import ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.jobs import num_usable_cores
from data_tools.stream.index import expand, open_index
from data_tools.stream.source import Source
from data_tools.templates import load_template
from data_tools.views.charts import ChartData, histogram, write_charts
from data_tools.views.measured import MAX_PIXELS, MIN_PIXELS, Measured, parse_transforms
from data_tools.views.plans import (
    PlanReport,
    Proposal,
    describe_plan,
    make_steps,
    padded_share,
    propose_max_pixels,
    propose_token_budget,
)

BATCH_SIZE = 8  # of the padded batches that packs are compared with
PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 99.9)
MAX_PLANNED = 200_000
UNLIMITED = 2**31  # tokens: every sample fits, at full size


@dataclass(frozen=True)
class BudgetReport:
    """What a token budget means for the data.

    Attributes:
        plan: how the packs come out.
        num_left_out: samples that no pack can hold.
        num_shrunk: samples whose pages are made smaller to fit.
    """

    plan: PlanReport
    num_left_out: int
    num_shrunk: int


@dataclass(frozen=True)
class Stats:
    """What is known of some shards.

    Attributes:
        num_shards: looked at.
        num_samples: in them.
        left_out: why samples are not used at any budget -> (how many, the first one's key).
        text: (n,) text tokens of the samples looked at.
        visual: (n,) visual tokens.
        pixels: (m,) area of every page in pixels, at full size.
        max_pixels: limit of the lengths.
        padding: share of padding in shuffled batches of `BATCH_SIZE`.
        budgets: of the budgets asked for.
        token_budget: a proposal.
        page_limit: a proposal; None where transforms set the size of pages.
        packs_per_step: M, the global batch in packs.
        ranks: of the balance.
    """

    num_shards: int
    num_samples: int
    left_out: dict[str, tuple[int, str]]
    text: np.ndarray
    visual: np.ndarray
    pixels: np.ndarray
    max_pixels: int
    padding: float
    budgets: tuple[BudgetReport, ...]
    token_budget: Proposal
    page_limit: Proposal | None
    packs_per_step: int
    ranks: int


def collect(
    measured: Measured, budgets: list[int], packs_per_step: int, ranks: int, num_planned: int
) -> Stats:
    """Plan an epoch of measured shards at several budgets.

    Args:
        measured: the shards.
        budgets: in tokens.
        packs_per_step: M, the global batch in packs.
        ranks: of the balance.
        num_planned: samples that are looked at; more than there are means all.
    """
    with measured.source(UNLIMITED) as source:
        part = _part(source, num_planned)
        drawn = [sample for i in range(part.num_draws(1)) for sample in part.draws(0, i)]
        left_out, num_samples = source.left_out, source.num_samples
    patches = np.asarray([sample.patches for sample in drawn], np.int64)
    tokens = np.asarray([sample.tokens for sample in drawn], np.int64)
    indexes = [open_index(shard, measured.index_dir) for shard in measured.shards]
    sizes = np.concatenate([np.asarray(index.image_wh, np.int64) for index in indexes])
    pixels = sizes[:, 0] * sizes[:, 1]
    is_resized = measured.images.keeps_size and len(pixels) > 0
    return Stats(
        num_shards=len(measured.shards),
        num_samples=num_samples,
        left_out=left_out,
        text=tokens - patches // 4,
        visual=patches // 4,
        pixels=pixels,
        max_pixels=measured.images.max_pixels,
        padding=padded_share(tokens, BATCH_SIZE),
        budgets=tuple(
            _at_budget(measured, budget, packs_per_step, ranks, num_planned) for budget in budgets
        ),
        token_budget=propose_token_budget(tokens),
        page_limit=propose_max_pixels(pixels) if is_resized else None,
        packs_per_step=packs_per_step,
        ranks=ranks,
    )


def _at_budget(
    measured: Measured, budget: int, packs_per_step: int, ranks: int, num_planned: int
) -> BudgetReport:
    with measured.source(budget) as source:
        steps = make_steps(_part(source, num_planned), budget, packs_per_step)
        plan = describe_plan(steps, budget, packs_per_step, ranks)
        return BudgetReport(
            plan,
            num_left_out=source.left_out.get("longer than a pack", (0, ""))[0],
            num_shrunk=source.num_fitted[0],
        )


def _part(source: Source, size: int) -> Source:
    """Return the source, or as many of its samples, seeded, where it has more."""
    if len(source) <= size:
        return source
    chosen = np.random.default_rng(0).choice(source.used, size, replace=False)
    return source.restricted_to(chosen.tolist())


def to_json(stats: Stats) -> dict[str, Any]:
    """Return the record that `--json` prints."""
    return {
        "shards": stats.num_shards,
        "samples": stats.num_samples,
        "planned_samples": len(stats.text),
        "left_out": {why: {"samples": n, "first": key} for why, (n, key) in stats.left_out.items()},
        "tokens": {
            "text": _percentiles(stats.text),
            "visual": _percentiles(stats.visual),
            "both": _percentiles(stats.text + stats.visual),
        },
        "padded": {"batch_size": BATCH_SIZE, "padding": stats.padding},
        "budgets": {
            str(budget.plan.token_budget): asdict(budget.plan)
            | {
                "padding": 1 - budget.plan.fill,
                "left_out": budget.num_left_out,
                "left_out_share": budget.num_left_out / stats.num_samples,
                "shrunk": budget.num_shrunk,
            }
            for budget in stats.budgets
        },
        "packs_per_step": stats.packs_per_step,
        "ranks": stats.ranks,
        "proposal": {
            "token_budget": asdict(stats.token_budget),
            "max_pixels": stats.page_limit and asdict(stats.page_limit),
        },
    }


def describe(stats: Stats) -> Iterator[str]:
    """Yield the lines for people."""
    looked_at = (
        f", {len(stats.text)} of them planned" if len(stats.text) < stats.num_samples else ""
    )
    yield f"{stats.num_samples} samples in {stats.num_shards} shards{looked_at}"
    for why, (count, first) in stats.left_out.items():
        yield f"  left out, {why}: {count} (first: {first})"
    both = stats.text + stats.visual
    yield from histogram(both, "tokens of a sample, text and visual")
    yield f"{'':8}" + "".join(f"{name:>9}" for name in _percentiles(both))
    for name, values in (("text", stats.text), ("visual", stats.visual), ("both", both)):
        yield f"{name:8}" + "".join(f"{value:9.0f}" for value in _percentiles(values).values())
    yield f"padding of shuffled batches of {BATCH_SIZE}: {stats.padding:.1%} of the tokens"
    for budget in stats.budgets:
        plan = budget.plan
        yield (
            f"packs of {plan.token_budget}: fill {plan.fill:.2%}, {plan.samples_per_pack:.1f} "
            f"samples a pack, {plan.balance - 1:.1%} waiting for the slowest of {stats.ranks} "
            f"ranks, {plan.num_packs} packs in {plan.num_steps} steps an epoch"
        )
        if plan.num_packs < stats.packs_per_step:
            yield f"  less than one step of {stats.packs_per_step} packs: some ranks have no work"
        yield (
            f"  too long: {budget.num_left_out} left out "
            f"({budget.num_left_out / stats.num_samples:.2%}), {budget.num_shrunk} shrunk to fit"
        )
    yield f"proposal: data.token_budget={stats.token_budget.value}"
    yield f"  {stats.token_budget.rule}"
    if stats.page_limit is not None:
        yield f"proposal: data.max_pixels={stats.page_limit.value}"
        yield f"  {stats.page_limit.rule}"


def _percentiles(values: np.ndarray) -> dict[str, float]:
    found = dict(zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True))
    points = {f"p{name:g}": float(value) for name, value in found.items()}
    return {"mean": float(values.mean())} | points | {"max": float(values.max())}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse_arguments(arguments)
    templates = tuple(load_template(name) for name in options.template)
    measured = Measured(
        expand(options.shards),
        options.model,
        ImageSettings(options.min_pixels, options.max_pixels, parse_transforms(options.preprocess)),
        Recipe(templates, (1.0,) * len(templates)),
        options.index_dir,
    )
    measured.measure(options.workers)
    stats = collect(
        measured, options.budgets, options.packs_per_step, options.ranks, options.samples
    )
    if options.json:
        print(json.dumps(to_json(stats), indent=2, ensure_ascii=False))
    else:
        print("\n".join(describe(stats)))
    if options.png is not None:
        plans = [budget.plan for budget in stats.budgets]
        chart = ChartData(
            stats.text,
            stats.visual,
            stats.pixels,
            stats.max_pixels,
            stats.padding,
            BATCH_SIZE,
            plans,
            stats.ranks,
        )
        write_charts(options.png, chart)
    return 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: if a number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.stats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="paths, URLs, globs, braces")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="whose tokenizer counts")
    parser.add_argument(
        "--template", nargs="+", default=["text-en"], metavar="NAME", help="what is asked (text-en)"
    )
    pages = parser.add_argument_group("pages, as in the section `data` of a configuration")
    pages.add_argument("--min-pixels", type=int, default=MIN_PIXELS, help=f"({MIN_PIXELS})")
    pages.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help=f"({MAX_PIXELS})")
    pages.add_argument("--preprocess", nargs="+", default=[], metavar="NAME|YAML")
    plan = parser.add_argument_group("packs")
    plan.add_argument("--budgets", default="8192,16384", metavar="N[,N]", help="tokens of a pack")
    plan.add_argument("--packs-per-step", type=int, default=64, metavar="M", help="(64)")
    plan.add_argument("--ranks", type=int, default=8, metavar="N", help="for the balance (8)")
    plan.add_argument(
        "--samples", type=int, default=MAX_PLANNED, metavar="N", help=f"looked at ({MAX_PLANNED})"
    )
    parser.add_argument("--workers", type=int, default=num_usable_cores())
    parser.add_argument("--index-dir", metavar="DIR", help="of indexes not beside the shards")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write charts")
    parser.add_argument("--json", action="store_true", help="print a JSON record")
    options = parser.parse_args(arguments)
    options.budgets = parse_budgets(options.budgets)
    counts = (options.packs_per_step, options.ranks, options.samples, options.workers)
    if min(counts) < 1 or not 0 < options.min_pixels <= options.max_pixels:
        raise ConfigError(
            "--packs-per-step, --ranks, --samples and --workers must be at least 1, and "
            "--min-pixels at most --max-pixels"
        )
    return options


def parse_budgets(text: str) -> list[int]:
    """Return the numbers of `8192,16384`.

    Raises:
        ConfigError: if they are none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--budgets {text}: expected numbers of tokens, as 8192,16384")
    return [int(part) for part in parts]


if __name__ == "__main__":
    run_command(main)
