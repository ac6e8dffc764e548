"""Weighted cross-entropy of a micro-step, as a sum: the trainer divides by the step's weights."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossOutput(NamedTuple):
    """What a micro-step gives.

    Attributes:
        weighted_sum: scalar float32, sum of weight x cross-entropy; the only part with a gradient.
        token_nll: (L,) float32, cross-entropy of each label token in nats.
        is_correct: (L,) bool, whether the label is the likeliest token.
    """

    weighted_sum: Tensor
    token_nll: Tensor
    is_correct: Tensor


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> LossOutput:
    """Return the sum of weight x cross-entropy over label tokens.

    Args:
        logits: (L, vocabulary) of any float type; reduced in float32.
        targets: (L,) int64.
        weights: (L,) float32 >= 0.
    """
    token_nll = F.cross_entropy(logits.float(), targets, reduction="none")
    with torch.no_grad():
        is_correct = logits.argmax(dim=-1) == targets
    return LossOutput((token_nll * weights).sum(), token_nll.detach(), is_correct)
