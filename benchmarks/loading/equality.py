"""Our patches against those of the processors that we stand in for; checked before any timing."""

import math

from benchmarks.loading.contenders import finished, hf_pages, image_normalizer, own_packs
from benchmarks.loading.pages import PageSet
from data_tools.examples.images import PixelMode
from data_tools.stream.source import Source

TOLERANCES = {
    "exact": 0.0,
    "fast": 1e-6,  # the torchvision processor joins rescaling and normalising: a few last bits
}
REFERENCES = {"exact": "pil", "fast": "torchvision"}


def max_difference(pages: PageSet, source: Source, mode: PixelMode) -> float:
    """Return the largest difference of our (P, 1176) patches from the processor's.

    Args:
        pages: the page set.
        source: the same pages, for ours.
        mode: ours.

    Raises:
        ValueError: if there are more or fewer pages than the processor gave.
    """
    ours = finished(own_packs(source, mode), image_normalizer())()
    theirs = hf_pages(pages, REFERENCES[mode])()
    worst = 0.0
    for our_patches, their_patches in zip(ours, theirs, strict=True):
        if our_patches.shape != their_patches.shape:
            return math.inf
        worst = max(worst, float((our_patches - their_patches).abs().max()))
    return worst


def queue_bytes(pages: PageSet, source: Source) -> tuple[int, int]:
    """Return the bytes of pixels that go through a queue for a page set: the processor's and ours.

    The grids and all else that belongs to a batch are small, and alike in both.
    """
    theirs = sum(patches.numel() * patches.element_size() for patches in hf_pages(pages, "pil")())
    packs = own_packs(source, "exact")()
    return theirs, sum(pack.flat.numel() * pack.flat.element_size() for pack in packs)
