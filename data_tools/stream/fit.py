"""Samples longer than a pack: shrink the images, split the answer into windows, or leave out.

Image tokens are never cut. The decision is made when the plan is, from numbers alone, so planner
and workers agree on it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data_tools.examples.encode import CONTEXT, FULL_SCALE, ImageSettings, part_of_answer
from data_tools.examples.images import num_visual_tokens

MIN_SCALE = 600  # of 1000 along each side: below that, small print is no longer legible
SCALE_STEP = 5
MIN_WINDOW = 4 * CONTEXT  # label tokens of a window, or the repeated context is the larger part
PATCHES_PER_VISUAL_TOKEN = 4

Policy = Literal["shrink", "split"]


@dataclass(frozen=True)
class Budgets:
    """Limits of one pack: tokens (text and visual) and vision patches."""

    tokens: int
    patches: int

    def hold(self, text: int, visual: int) -> bool:
        """Return whether a pack of its own can take a sample."""
        return text + visual <= self.tokens and PATCHES_PER_VISUAL_TOKEN * visual <= self.patches


class Question(NamedTuple):
    """A sample with one of its questions, in tokens.

    Attributes:
        text: without image pads.
        targets: label tokens among them, end tokens included.
        visual: tokens of its images at full size.
        num_answers: turns of the assistant; only a single answer can be split.
        sizes: (height, width) px of its images as they are stored.
    """

    text: int
    targets: int
    visual: int
    num_answers: int
    sizes: tuple[tuple[int, int], ...]


class Fit(NamedTuple):
    """How a long sample is made to fit: side length in thousandths, parts of its answer."""

    scale: int
    windows: int
    visual: int


def fit(
    question: Question, budgets: Budgets, images: ImageSettings, policies: Sequence[Policy]
) -> Fit | None:
    """Return how a sample that exceeds the budgets fits a pack, or None where it does not.

    Args:
        question: the sample's lengths.
        budgets: of a pack.
        images: of the run; pages cannot be shrunk where their transforms set the size.
        policies: what may be done, in the order of preference.
    """
    for policy in policies:
        found = _shrink(question, budgets, images) if policy == "shrink" else None
        found = _split(question, budgets) if policy == "split" else found
        if found is not None:
            return found
    return None


def window_tokens(text: int, targets: int, visual: int, window: int, windows: int) -> int:
    """Return the tokens of one part of a split sample: head, images, context and its labels."""
    start, stop = part_of_answer(targets, window, windows)
    return text - targets + visual + min(CONTEXT, start) + stop - start


def _shrink(question: Question, budgets: Budgets, images: ImageSettings) -> Fit | None:
    allowed = min(budgets.tokens - question.text, budgets.patches // PATCHES_PER_VISUAL_TOKEN)
    if not images.keeps_size or allowed <= 0:
        return None
    first = min(FULL_SCALE, math.isqrt(FULL_SCALE**2 * allowed // max(question.visual, 1)))
    for scale in (*range(first, MIN_SCALE, -SCALE_STEP), MIN_SCALE):
        sizes = (images.resized_size(*size, scale=scale) for size in question.sizes)
        visual = sum(num_visual_tokens(*size) for size in sizes)
        if visual <= allowed:
            return Fit(scale, 1, visual)
    return None


def _split(question: Question, budgets: Budgets) -> Fit | None:
    text, targets, visual = question.text, question.targets, question.visual
    room = budgets.tokens - (text - targets) - visual - CONTEXT
    if question.num_answers != 1 or room < MIN_WINDOW or not budgets.hold(0, visual):
        return None
    return Fit(FULL_SCALE, math.ceil(targets / room), visual)
