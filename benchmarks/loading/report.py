"""The loader benchmark's findings as the record for `--json` and as text."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.loading.environment import MISSING, versions
from benchmarks.loading.equality import TOLERANCES
from benchmarks.loading.pages import PageSet
from benchmarks.loading.timing import Timing
from data_tools.views.plans import PlanReport

COLUMNS = {
    "hf_slow": "webdataset + HF PIL processor",
    "hf_fast": "webdataset + HF torchvision processor",
    "peer": "Megatron-Energon + HF PIL processor",
    "exact": "ours, exact",
    "fast": "ours, fast",
}
FINISHED = {"exact": "exact_finished", "fast": "fast_finished"}
UNFINISHED = "patch order, normalisation and temporal copy are left to the device"


@dataclass(frozen=True)
class Findings:
    """All that was measured.

    Attributes:
        pages: the page sets.
        timings: set name -> contender name -> timing.
        max_diff: mode -> largest difference from its reference; None where that is not installed.
        queue_bytes_ratio: bytes of the HF processor's pixels / bytes of ours.
        plans: name of a budget -> how the mix was planned, and the seconds that took for a sample.
        plan_share: planning time / time to load the same samples.
        rounds: of the timings.
    """

    pages: list[PageSet]
    timings: Mapping[str, Mapping[str, Timing]]
    max_diff: Mapping[str, float | None]
    queue_bytes_ratio: float
    plans: Mapping[str, tuple[PlanReport, float]]
    plan_share: float
    rounds: int

    @property
    def is_equal(self) -> bool:
        """Whether every difference that could be measured is within its tolerance."""
        return all(diff is None or diff <= TOLERANCES[mode] for mode, diff in self.max_diff.items())

    def images_per_s(self, pages: PageSet, name: str) -> float | None:
        """Return images per second and core; None for a contender that is not installed."""
        timing = self.timings[pages.name].get(name)
        return None if timing is None else pages.num_pages / timing.median_s


def to_json(found: Findings) -> dict[str, Any]:
    """Return the record that `--json` prints."""
    return {
        "images_per_s": {
            pages.name: {name: found.images_per_s(pages, name) for name in COLUMNS}
            for pages in found.pages
        },
        "max_diff": dict(found.max_diff),
        "queue_bytes_ratio": found.queue_bytes_ratio,
        "fill": {name: plan.fill for name, (plan, _) in found.plans.items()},
        "balance_8": found.plans["8k"][0].balance,
        "plan_share": found.plan_share,
    }


def to_text(found: Findings) -> str:
    """Return the findings for people."""
    lines = ["Python " + platform.python_version() + ", " + _joined(versions())]
    lines += [f"CPU time of one thread, median of {found.rounds} interleaved rounds"]
    for pages in found.pages:
        lines += ["", *_page_table(found, pages)]
    lines += ["", *_equality(found), "", *_planning(found)]
    return "\n".join(lines)


def _page_table(found: Findings, pages: PageSet) -> list[str]:
    lines = [
        f"{pages.name}: {pages.num_pages} pages, {pages.source}, {pages.megapixels:.2f} MP, "
        f"{pages.kilobytes:.0f} KB",
        f"  {'':40}{'images/s':>9}{'ms':>8}{'x slow':>8}{'x fast':>8}{'spread':>8}",
    ]
    for name, label in COLUMNS.items():
        lines.append(_row(found, pages, name, label))
    lines.append(f"  In ours {UNFINISHED}. With that done on the CPU:")
    for mode, name in FINISHED.items():
        lines.append(_row(found, pages, name, f"{COLUMNS[mode]}, with finish on CPU"))
    return lines


def _row(found: Findings, pages: PageSet, name: str, label: str) -> str:
    speed = found.images_per_s(pages, name)
    if speed is None:
        return f"  {label:40}{MISSING}"
    ratios = [found.images_per_s(pages, reference) for reference in ("hf_slow", "hf_fast")]
    cells = [f"{speed / ratio:8.2f}" if ratio else f"{'-':>8}" for ratio in ratios]
    spread = found.timings[pages.name][name].spread
    return f"  {label:40}{speed:9.1f}{1000 / speed:8.1f}{''.join(cells)}{spread:8.0%}"


def _equality(found: Findings) -> list[str]:
    lines = []
    for mode, diff in found.max_diff.items():
        reference = COLUMNS["hf_slow" if mode == "exact" else "hf_fast"]
        value = MISSING if diff is None else f"{diff:.3g} (at most {TOLERANCES[mode]:g})"
        lines.append(f"largest difference of {mode} patches from {reference}: {value}")
    lines.append(f"bytes of pixels through the queue, HF / ours: {found.queue_bytes_ratio:.2f}")
    return lines


def _planning(found: Findings) -> list[str]:
    lines = ["plan of the mix (receipts, lines, A4 pages, forms); 64 packs a step, 8 ranks"]
    for name, (plan, seconds) in found.plans.items():
        lines.append(
            f"  {name:>4}: fill {plan.fill:.3%}, slowest rank / ideal {plan.balance:.3f}, "
            f"{plan.samples_per_pack:.1f} samples a pack, {1e6 * seconds:.0f} us a sample"
        )
    lines.append(f"planning takes {found.plan_share:.2%} of the time to load the same pages, exact")
    return lines


def _joined(items: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in items.items())
