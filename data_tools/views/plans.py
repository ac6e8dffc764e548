"""How a plan comes out: pack fill, balance over ranks, and what padded batches would waste."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.stream.fit import PATCHES_PER_VISUAL_TOKEN
from data_tools.stream.planner import DataState, DrawableSource, Pack, Planner, Step, pack_cost

MIN_TOKEN_BUDGET = 4096
DOCUMENTS_PER_PACK = 8
SHARE_THAT_FITS = 0.999
PIXELS_STEP = 256 * 28 * 28  # 256 visual tokens
SHARE_AT_FULL_SIZE = 0.99
PUBLISHED_MAX_PIXELS = 12_845_056  # of the published checkpoint's preprocessor


@dataclass(frozen=True)
class PlanReport:
    """How one epoch comes out at a token budget.

    Attributes:
        token_budget: of a pack.
        num_packs: of the epoch.
        num_steps: likewise; the last one may have fewer packs.
        fill: share of the packs' token budgets that samples take.
        balance: sum over micro-steps of the slowest rank's cost, divided by the ideal.
        samples_per_pack: mean.
    """

    token_budget: int
    num_packs: int
    num_steps: int
    fill: float
    balance: float
    samples_per_pack: float


@dataclass(frozen=True)
class Proposal:
    """A setting that suits the data, and the rule that it comes from."""

    value: int
    rule: str


def make_steps(
    source: DrawableSource, token_budget: int, packs_per_step: int, epochs: int = 1
) -> list[Step]:
    """Plan some epochs of a source with four patches a token, which never bind."""
    planner = Planner(
        sources=[source],
        epochs=[epochs],
        token_budget=token_budget,
        patch_budget=PATCHES_PER_VISUAL_TOKEN * token_budget,
        packs_per_step=packs_per_step,
        state=DataState.first({}, [""]),
    )
    steps = []
    while (step := planner.next_step()) is not None:
        steps.append(step)
    return steps


def describe_plan(
    steps: Sequence[Step], token_budget: int, packs_per_step: int, ranks: int
) -> PlanReport:
    """Return how the steps of an epoch come out.

    Args:
        steps: of the epoch, not empty.
        token_budget: of a pack.
        packs_per_step: of a full step.
        ranks: data-parallel ranks, for the balance. The last step counts only if there is no other.
    """
    packs = [pack for step in steps for pack in step.packs]
    full = [step for step in steps if len(step.packs) == packs_per_step]
    tokens = sum(sample.tokens for pack in packs for sample in pack)
    return PlanReport(
        token_budget=token_budget,
        num_packs=len(packs),
        num_steps=len(steps),
        fill=tokens / (len(packs) * token_budget),
        balance=balance(full or steps, ranks),
        samples_per_pack=sum(len(pack) for pack in packs) / len(packs),
    )


def balance(steps: Iterable[Step], ranks: int) -> float:
    """Return the summed cost of the slowest rank of each micro-step, divided by the ideal.

    The ideal is that every micro-step's cost is spread evenly over the ranks.
    """
    slowest = total = 0
    for step in steps:
        for micro_step in step.assign(ranks):
            costs = [_cost(pack) for pack in micro_step]
            slowest += max(costs)
            total += sum(costs)
    return slowest * ranks / total


def padded_share(tokens: np.ndarray, batch_size: int, seed: int = 0) -> float:
    """Return the share of padding in shuffled batches, each padded to its longest sample."""
    shuffled = np.random.default_rng(seed).permutation(tokens)
    starts = np.arange(0, len(shuffled), batch_size)
    sizes = np.minimum(batch_size, len(shuffled) - starts)
    return 1 - float(shuffled.sum() / (np.maximum.reduceat(shuffled, starts) * sizes).sum())


def propose_token_budget(tokens: np.ndarray) -> Proposal:
    """Return a token budget for samples of these lengths, at full size."""
    needed = max(np.quantile(tokens, SHARE_THAT_FITS), DOCUMENTS_PER_PACK * tokens.mean())
    value = max(MIN_TOKEN_BUDGET, 1 << int(np.ceil(np.log2(needed))))
    return Proposal(
        value,
        f"the smallest power of two that holds {SHARE_THAT_FITS:.1%} of the samples whole and "
        f"{DOCUMENTS_PER_PACK} documents of mean length",
    )


def propose_max_pixels(pixels: np.ndarray) -> Proposal:
    """Return a page size limit for pages of these areas in pixels."""
    needed = float(np.quantile(pixels, SHARE_AT_FULL_SIZE))
    value = int(np.ceil(needed / PIXELS_STEP)) * PIXELS_STEP
    return Proposal(
        min(max(value, PIXELS_STEP), PUBLISHED_MAX_PIXELS),
        f"the smallest multiple of {PIXELS_STEP} px (256 visual tokens) at which "
        f"{SHARE_AT_FULL_SIZE:.0%} of the pages keep their size, at most {PUBLISHED_MAX_PIXELS}",
    )


def _cost(pack: Pack | None) -> int:
    return 0 if pack is None else pack_cost(pack)
