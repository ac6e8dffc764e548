"""Histograms of lengths for a terminal, and the page of charts that `data_tools.stats` writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.views.plans import PlanReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR_CHARS = 40
NUM_BINS = 14
NUM_FINE_BINS = 48
TEXT_COLOUR, VISUAL_COLOUR, OWN_COLOUR, OTHER_COLOUR = "#d9822b", "#3f7cac", "#2f7d5b", "#b5483a"
GRID_COLOUR = "#dddddd"


@dataclass(frozen=True)
class ChartData:
    """What the page of charts shows.

    Attributes:
        text: (n,) text tokens.
        visual: (n,) visual tokens.
        pixels: (m,) area of each page in pixels, at full size.
        max_pixels: the limit that the lengths were measured with.
        padding: share of padding in shuffled batches of `batch_size`.
        batch_size: of these.
        plans: packs at several budgets.
        ranks: of their balance.
    """

    text: np.ndarray
    visual: np.ndarray
    pixels: np.ndarray
    max_pixels: int
    padding: float
    batch_size: int
    plans: Sequence[PlanReport]
    ranks: int


def histogram(values: np.ndarray, label: str) -> list[str]:
    """Return lines of a histogram with bins of equal ratio, for a terminal."""
    edges = _edges(values, NUM_BINS)
    counts, _ = np.histogram(values, edges)
    lines = [label]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * round(BAR_CHARS * count / counts.max())
        bounds = f"{int(np.ceil(low)):>7} - {int(np.ceil(high)) - 1:<7}"
        lines.append(f"  {bounds} {bar:{BAR_CHARS}} {count}")
    return lines


def write_charts(path: Path, data: ChartData) -> None:
    """Write the charts as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _draw_lengths(axes[0, 0], data)
    _draw_pages(axes[0, 1], data)
    _draw_padding(axes[1, 0], data)
    _draw_balance(axes[1, 1], data)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color=GRID_COLOUR)
    figure.savefig(path, format="png")


def _draw_lengths(axis: "Axes", data: ChartData) -> None:
    total = data.text + data.visual
    edges = _edges(np.concatenate([np.maximum(data.text, 1), total]), NUM_FINE_BINS)
    for values, colour, label in (
        (data.visual, VISUAL_COLOUR, "visual"),
        (data.text, TEXT_COLOUR, "text"),
    ):
        axis.hist(values, edges.tolist(), color=colour, alpha=0.55, label=label)
    axis.hist(total, edges.tolist(), histtype="step", color="black", linewidth=1.4, label="both")
    for plan in data.plans:
        axis.axvline(plan.token_budget, color=OWN_COLOUR, linestyle="--", linewidth=1)
    axis.set(xscale="log", xlabel="tokens", ylabel="samples", title="Length of a sample")
    if data.plans:
        axis.plot([], [], color=OWN_COLOUR, linestyle="--", linewidth=1, label="budgets")
    axis.legend(frameon=False)


def _draw_pages(axis: "Axes", data: ChartData) -> None:
    megapixels = data.pixels / 1e6
    axis.hist(megapixels, NUM_FINE_BINS, color=VISUAL_COLOUR)
    share = float((data.pixels > data.max_pixels).mean()) if len(data.pixels) else 0.0
    limit = data.max_pixels / 1e6
    if len(megapixels) and limit <= 2 * megapixels.max():
        axis.axvline(limit, color=OTHER_COLOUR, linestyle="--", linewidth=1.2)
    axis.set(
        xlabel="megapixels",
        ylabel="pages",
        title=f"Size of a page; {share:.1%} are above max_pixels = {data.max_pixels:,}",
    )


def _draw_padding(axis: "Axes", data: ChartData) -> None:
    names = [f"padded\nbatches of {data.batch_size}"]
    names += [f"packs of\n{plan.token_budget:,}" for plan in data.plans]
    shares = [100 * data.padding, *(100 * (1 - plan.fill) for plan in data.plans)]
    colours = [OTHER_COLOUR, *[OWN_COLOUR] * len(data.plans)]
    bars = axis.bar(names, shares, color=colours, width=0.6)
    axis.bar_label(bars, [f"{share:.2f} %" for share in shares], padding=3)
    axis.set(ylabel="%", title="Tokens that are computed for nothing")
    axis.margins(y=0.15)


def _draw_balance(axis: "Axes", data: ChartData) -> None:
    names = [f"packs of\n{plan.token_budget:,}" for plan in data.plans]
    excess = [100 * (plan.balance - 1) for plan in data.plans]
    bars = axis.bar(names, excess, color=OWN_COLOUR, width=0.4)
    axis.bar_label(bars, [f"{value:.2f} %" for value in excess], padding=3)
    axis.set(ylabel="%", title=f"Waiting for the slowest of {data.ranks} ranks")
    axis.margins(x=0.3, y=0.15)


def _edges(values: np.ndarray, num_bins: int) -> np.ndarray:
    """Return edges of equal ratio around all values, which are counts."""
    low, high = max(1, int(values.min())), int(values.max()) + 1
    return np.unique(np.geomspace(low, max(high, low + 1), num_bins + 1))
