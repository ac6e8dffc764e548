"""Augmentation: seeded by (seed, key, epoch), size kept, boxes move with the ink."""

import dataclasses

import numpy as np
import pytest

from data_tools.examples.augment import Augmentation
from data_tools.sample import Annotation, PageImage, Sample

ALL = Augmentation(
    rotate_deg=4, shear=0.1, blur_sigma_px=1.5, noise_sigma=9, contrast=0.3, brightness=20
)
MOVES = Augmentation(rotate_deg=5, shear=0.1)


def page_with_box(scale: float = 1.0) -> tuple[Sample, np.ndarray]:
    """Return a sample of one inked box and its prepared page, `scale` times the original's size."""
    page = PageImage("a.png", 400, 300)
    box = (150, 120, 260, 170)
    sample = Sample("doc", (page,), (Annotation("x", box),))
    image = np.full((round(300 * scale), round(400 * scale), 3), 240, np.uint8)
    x1, y1, x2, y2 = (round(edge * scale) for edge in box)
    image[y1:y2, x1:x2] = 0
    return sample, image


def test_the_draw_is_fixed_by_seed_key_and_epoch() -> None:
    sample, image = page_with_box()
    other_key = dataclasses.replace(sample, key="doc2")

    def draw(which: Sample, seed: int, epoch: int) -> bytes:
        return ALL(which, (image,), seed, epoch)[1][0].tobytes()

    assert draw(sample, 1, 2) == draw(sample, 1, 2)
    variants = {draw(sample, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(variants) >= 8  # a draw may leave the page as it is
    assert draw(other_key, 1, 2) != draw(sample, 1, 2)


def test_pages_of_a_sample_are_drawn_apart() -> None:
    sample, image = page_with_box()
    sample = dataclasses.replace(sample, images=sample.images * 2)
    first, second = ALL(sample, (image, image), 0, 0)[1]
    assert not np.array_equal(first, second)


def test_size_and_type_stay() -> None:
    sample, image = page_with_box()
    strip = np.ascontiguousarray(image[:28, :280])
    for epoch in range(20):
        for page in (image, strip):
            _, (changed,) = ALL(sample, (page,), 0, epoch)
            assert changed.shape == page.shape and changed.dtype == np.uint8


def test_everything_off_changes_nothing() -> None:
    sample, image = page_with_box()
    for epoch in range(10):
        same, (page,) = Augmentation()(sample, (image,), 0, epoch)
        assert same == sample and np.array_equal(page, image)


@pytest.mark.parametrize("scale", [1.0, 0.7, 1.4])
def test_boxes_move_with_the_ink(scale: float) -> None:
    sample, image = page_with_box(scale)
    num_moved = 0
    for epoch in range(30):
        moved, (page,) = MOVES(sample, (image,), 0, epoch)
        box = moved.annotations[0].bbox
        assert box is not None
        rows, columns = np.nonzero(page[:, :, 0] < 120)
        ink = np.asarray([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale
        assert np.abs(ink - box).max() <= 2.5
        moved.validate()
        num_moved += box != sample.annotations[0].bbox
    assert num_moved > 10


def test_only_boxes_of_the_moved_page_move() -> None:
    sample, image = page_with_box()
    there = Annotation("y", (1, 1, 9, 9), image=1)
    sample = dataclasses.replace(
        sample, images=sample.images * 2, annotations=(*sample.annotations, there, Annotation("z"))
    )
    for epoch in range(20):
        moved, pages = MOVES(sample, (image, image), 0, epoch)
        second_moved = not np.array_equal(pages[1], image)
        assert (moved.annotations[1] != there) == second_moved
        assert moved.annotations[2] == Annotation("z")


def test_boxes_at_the_border_stay_on_the_page() -> None:
    sample, image = page_with_box()
    corners = [(0, 0, 5, 5), (395, 0, 400, 5), (0, 295, 5, 300), (395, 295, 400, 300)]
    sample = dataclasses.replace(sample, annotations=tuple(Annotation("x", box) for box in corners))
    for epoch in range(30):
        MOVES(sample, (image,), 0, epoch)[0].validate()


def test_long_strips_turn_little() -> None:
    """The ends of a 1:40 strip must not leave it."""
    sample = Sample("k", (PageImage("a.png", 1120, 28),))
    strip = np.full((28, 1120, 3), 255, np.uint8)
    strip[10:18] = 0
    for epoch in range(20):
        _, (changed,) = Augmentation(rotate_deg=10)(sample, (strip,), 0, epoch)
        assert (changed[:, 0, 0] < 128).any() and (changed[:, -1, 0] < 128).any()
