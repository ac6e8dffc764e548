"""Seeded augmentation of prepared pages: (run seed, key, epoch) fixes every draw.

It works on the image as the model would see it and keeps width and height, so that planned lengths
hold. Boxes move along with the page.
"""

import dataclasses
from dataclasses import dataclass

import cv2
import numpy as np

from data_tools.sample import Annotation, Box, Sample
from data_tools.stream.hashing import hash_key


@dataclass(frozen=True)
class Augmentation:
    """How often and how strongly pages are changed; 0 switches a part off.

    Attributes:
        rotate_deg: largest rotation, in degrees; drawn for half of the pages.
        shear: largest horizontal shear (dx per dy); drawn for a third of them.
        blur_sigma_px: largest Gaussian blur; drawn for a third.
        noise_sigma: largest Gaussian noise, in grey levels; drawn for 40 %.
        contrast: largest relative change of contrast; drawn for 60 %.
        brightness: largest shift, in grey levels; drawn for 60 %.
    """

    rotate_deg: float = 0.0
    shear: float = 0.0
    blur_sigma_px: float = 0.0
    noise_sigma: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0

    def __call__(
        self, sample: Sample, images: tuple[np.ndarray, ...], seed: int, epoch: int
    ) -> tuple[Sample, tuple[np.ndarray, ...]]:
        """Return the sample with moved boxes, and its changed (H, W, 3) uint8 images."""
        changed, annotations = [], list(sample.annotations)
        for number, image in enumerate(images):
            draw = np.random.default_rng(hash_key(seed, "augment", sample.key, epoch, number))
            matrix = self._affine(draw, image.shape[0], image.shape[1])
            if matrix is not None:
                image = _warp(image, matrix)
                page = sample.images[number]
                # Boxes are in pixels of the page, the matrix in pixels of the prepared image.
                scale = (image.shape[1] / page.width, image.shape[0] / page.height)
                annotations = [
                    _moved(a, matrix, scale, (page.width, page.height)) if a.image == number else a
                    for a in annotations
                ]
            changed.append(self._levels(draw, image))
        return dataclasses.replace(sample, annotations=tuple(annotations)), tuple(changed)

    def _affine(self, draw: np.random.Generator, height: int, width: int) -> np.ndarray | None:
        """Return a (2, 3) matrix about the page's centre, or None for an unmoved page."""
        angle, shear = 0.0, 0.0
        if draw.random() < 0.5:
            angle = np.deg2rad(draw.uniform(-self.rotate_deg, self.rotate_deg))
        if draw.random() < 1 / 3:
            shear = draw.uniform(-self.shear, self.shear)
        if angle == 0 and shear == 0:
            return None
        # On a long strip a rotation would push its ends out: at most a tenth of the height.
        angle = np.clip(angle, -0.2 * height / width, 0.2 * height / width)
        linear = np.array([[1, shear], [0, 1]]) @ np.array(
            [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        )
        centre = np.array([width / 2, height / 2])
        return np.concatenate([linear, (centre - linear @ centre)[:, None]], axis=1)

    def _levels(self, draw: np.random.Generator, image: np.ndarray) -> np.ndarray:
        if draw.random() < 1 / 3 and self.blur_sigma_px > 0:
            image = cv2.GaussianBlur(image, (0, 0), draw.uniform(0.1, self.blur_sigma_px))
        if draw.random() < 0.6 and (self.contrast or self.brightness):
            gain = 1 + draw.uniform(-self.contrast, self.contrast)
            shift = draw.uniform(-self.brightness, self.brightness)
            image = ((image.astype(np.float32) - 128) * gain + 128 + shift).clip(0, 255)
        if draw.random() < 0.4 and self.noise_sigma > 0:
            sigma = draw.uniform(0, self.noise_sigma)
            noise = draw.normal(0, sigma, image.shape[:2]).astype(np.float32)
            image = (image.astype(np.float32) + noise[:, :, None]).clip(0, 255)
        return np.ascontiguousarray(image, dtype=np.uint8)


def _warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    size = (image.shape[1], image.shape[0])
    background = [float(np.median(image[:, :, channel])) for channel in range(3)]
    return np.asarray(cv2.warpAffine(image, matrix, size, borderValue=background))


def _moved(
    annotation: Annotation,
    matrix: np.ndarray,
    scale: tuple[float, float],
    page_wh: tuple[int, int],
) -> Annotation:
    """Return the annotation with the box that encloses its moved corners, clipped to the page."""
    if annotation.bbox is None:
        return annotation
    x1, y1, x2, y2 = annotation.bbox
    corners = np.array([[x1, y1], [x2, y1], [x1, y2], [x2, y2]], np.float64) * scale
    moved = (corners @ matrix[:, :2].T + matrix[:, 2]) / scale
    low = np.clip(np.floor(moved.min(axis=0)), 0, np.array(page_wh) - 1).astype(int)
    high = np.clip(np.ceil(moved.max(axis=0)), low + 1, page_wh).astype(int)
    box: Box = (int(low[0]), int(low[1]), int(high[0]), int(high[1]))
    return dataclasses.replace(annotation, bbox=box)
