"""The mix of documents that plans are compared on, and what the planner makes of it.

Nothing is read or decoded here: the mix is drawn, and the planner sees lengths only.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.stream.planner import PlannedSample
from data_tools.views.plans import PlanReport, describe_plan, make_steps

SEED = 20261123
TEMPLATE_TOKENS = 30
MIN_PIXELS, MAX_PIXELS = 3136, 4096 * 784
FACTOR_PX = 28


@dataclass
class LengthSource:
    """Samples that are nothing but lengths, in an order that is random already.

    Attributes:
        tokens: (n,) text and visual tokens.
        patches: (n,) vision patches.
        weight: of interleaving.
    """

    tokens: Sequence[int]
    patches: Sequence[int]
    weight: float = 1.0

    def num_draws(self, epochs: int) -> int:
        """Return how many draws the first epochs take."""
        return epochs * len(self.tokens)

    def draws(self, source: int, number: int) -> tuple[PlannedSample, ...]:
        """Return the sample of a draw."""
        epoch, row = divmod(number, len(self.tokens))
        tokens, patches = self.tokens[row], self.patches[row]
        return (PlannedSample(source, number, row, epoch, 0, tokens, patches),)


def draw_mix(num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the lengths of receipts (50 %), text lines (20 %), A4 pages (20 %) and forms (10 %).

    Text lengths are log-normal, sizes those of scans at usual resolutions; an image is counted by
    the rule of `smart_resize`.

    Returns:
        tokens: (num_samples,) int64, text and visual.
        patches: (num_samples,) int64.
    """
    draw = np.random.Generator(np.random.PCG64(SEED))
    kinds = np.digitize(draw.random(num_samples), [0.5, 0.7, 0.9])
    normal = draw.standard_normal((num_samples, 2))
    uniform = draw.random((num_samples, 3))
    columns = [
        rule(normal[:, 0], normal[:, 1], uniform)
        for rule in (_receipts, _text_lines, _a4_pages, _forms)
    ]
    height, width, text = (np.choose(kinds, column) for column in zip(*columns, strict=True))
    patches = _patches(np.rint(height), np.rint(width))
    return np.rint(text).astype(np.int64) + TEMPLATE_TOKENS + patches // 4, patches


def plan_mix(
    tokens: np.ndarray, patches: np.ndarray, token_budget: int, packs_per_step: int, ranks: int
) -> tuple[PlanReport, float]:
    """Plan one epoch of some samples with four patches a token.

    Returns:
        how it came out, and the CPU seconds that planning took for a sample.
    """
    source = LengthSource(tokens.tolist(), patches.tolist())
    start_s = time.process_time()
    steps = make_steps(source, token_budget, packs_per_step)
    seconds = time.process_time() - start_s
    return describe_plan(steps, token_budget, packs_per_step, ranks), seconds / len(tokens)


Columns = tuple[np.ndarray, np.ndarray, np.ndarray]  # height, width, text tokens


def _receipts(z0: np.ndarray, z1: np.ndarray, r: np.ndarray) -> Columns:
    width = 450 + 650 * r[:, 0]
    height = np.clip(width * np.exp(np.log(2.2) + 0.25 * z1), 600, 3000)
    return height, width, np.clip(_log_normal(260, 0.45, z0), 30, 1200)


def _text_lines(z0: np.ndarray, z1: np.ndarray, r: np.ndarray) -> Columns:
    height = 32 + 64 * r[:, 0]
    width = np.clip(height * np.exp(np.log(9) + 0.5 * z1), 64, 1800)
    return height, width, np.clip(_log_normal(18, 0.5, z0), 2, 120)


def _a4_pages(z0: np.ndarray, z1: np.ndarray, r: np.ndarray) -> Columns:
    height = 1024 + 776 * r[:, 0]
    return height, height / np.sqrt(2), np.clip(_log_normal(1100, 0.5, z0), 100, 4000)


def _forms(z0: np.ndarray, z1: np.ndarray, r: np.ndarray) -> Columns:
    long = 1024 + 776 * r[:, 0]
    short = long / (1.25 + 0.2 * r[:, 1])
    is_landscape = r[:, 2] < 0.2
    text = np.clip(_log_normal(450, 0.5, z0), 60, 2500)
    return np.where(is_landscape, short, long), np.where(is_landscape, long, short), text


def _log_normal(median: float, sigma: float, z: np.ndarray) -> np.ndarray:
    return np.exp(np.log(median) + sigma * z)


def _patches(height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Return the vision patches of images: `smart_resize` of transformers, for whole columns."""
    new_height, new_width = (np.rint(side / FACTOR_PX) * FACTOR_PX for side in (height, width))
    area = height * width
    shrink, grow = np.sqrt(area / MAX_PIXELS), np.sqrt(MIN_PIXELS / area)
    is_large, is_small = new_height * new_width > MAX_PIXELS, new_height * new_width < MIN_PIXELS
    sides = []
    for side, new_side in ((height, new_height), (width, new_width)):
        shrunk = np.maximum(FACTOR_PX, np.floor(side / shrink / FACTOR_PX) * FACTOR_PX)
        grown = np.ceil(side * grow / FACTOR_PX) * FACTOR_PX
        sides.append(np.where(is_large, shrunk, np.where(is_small, grown, new_side)))
    return (sides[0] * sides[1] / 196).astype(np.int64)
