"""Look at samples as the model sees them: resized and augmented, with boxes and reading order.

    python -m data_tools.peek SHARDS OUT
    python -m data_tools.peek SHARDS OUT --key INVOICE-0042 --max-pixels 802816
    python -m data_tools.peek SHARDS OUT --num 20 --augment rotate_deg=2,noise_sigma=6 --epoch 3
    python -m data_tools.peek LINES OUT --preprocess '{name: line_strip, stretch: 2.5}'

OUT/KEY.png (KEY-1.png and so on for further pages) shows each page with numbered boxes, coloured by
category, and beside it the texts in their order and the fields. What is drawn is what training gets
with the same settings and seed.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.errors import ConfigError, DataError, run_command
from data_tools.examples.augment import Augmentation
from data_tools.examples.encode import ImageSettings
from data_tools.examples.images import decode, num_visual_tokens
from data_tools.sample import Sample
from data_tools.stream.index import ShardIndex, expand, open_index
from data_tools.views.drawing import Fonts, draw_sample_page
from data_tools.views.measured import MAX_PIXELS, MIN_PIXELS, parse_transforms


@dataclass(frozen=True)
class View:
    """How samples are prepared before they are drawn.

    Attributes:
        images: resize and transforms.
        augmentation: of training; None for none.
        seed: of the run.
        epoch: which the augmentation is drawn for.
    """

    images: ImageSettings
    augmentation: Augmentation | None = None
    seed: int = 0
    epoch: int = 0

    def prepare(self, sample: Sample) -> tuple[Sample, tuple[np.ndarray, ...]]:
        """Return the sample, boxes moved, and its (H, W, 3) uint8 images as the model sees them."""
        pages = tuple(
            np.array(self.images.prepare(decode(data, f'sample "{sample.key}", image {number}')))
            for number, data in enumerate(sample.image_bytes)
        )
        if self.augmentation is None:
            return sample, pages
        return self.augmentation(sample, pages, self.seed, self.epoch)


def choose(
    indexes: Sequence[ShardIndex], num: int, seed: int, key: str | None
) -> list[tuple[ShardIndex, int]]:
    """Return (index, row) of the samples to draw: that of a key, or some drawn by the seed.

    Raises:
        DataError: if no shard has the key, or no sample is usable.
    """
    if key is not None:
        found = [(i, row) for i in indexes for row, name in enumerate(i.keys) if name == key]
        if not found:
            raise DataError(f'no sample "{key}" in {len(indexes)} shards')
        return found
    starts = np.cumsum([0, *(len(index) for index in indexes)])
    chosen: list[tuple[ShardIndex, int]] = []
    for place in np.random.default_rng(seed).permutation(int(starts[-1])).tolist():
        number = int(np.searchsorted(starts, place, side="right")) - 1
        row = place - int(starts[number])
        if row not in indexes[number].reasons:
            chosen.append((indexes[number], row))
        if len(chosen) == num:
            break
    if not chosen:
        raise DataError("the shards hold no usable sample; `python -m data_tools.check` says why")
    return chosen


def draw(sample: Sample, view: View, out: Path, fonts: Fonts) -> list[Path]:
    """Draw every page of a sample into a folder; return the files.

    Raises:
        DataError: if an image cannot be decoded.
    """
    moved, images = view.prepare(sample)
    paths = []
    for number, image in enumerate(images):
        page = sample.images[number]
        height, width = image.shape[:2]
        head = [
            sample.key + (f", page {number + 1} of {len(images)}" if len(images) > 1 else ""),
            f"{page.width} x {page.height} px, the model sees {width} x {height} px, "
            f"{num_visual_tokens(height, width)} visual tokens",
        ]
        has_boxes = any(a.bbox is not None and a.image == number for a in moved.annotations)
        if has_boxes and not view.images.keeps_size:
            head.append("boxes are not drawn: the transforms change the geometry of the page")
        sheet = draw_sample_page(moved, number, image, head, fonts, view.images.keeps_size)
        name = sample.key.replace("/", "_") + (f"-{number}" if number else "")
        paths.append(out / f"{name}.png")
        sheet.save(paths[-1])
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse_arguments(arguments)
    view = View(
        ImageSettings(options.min_pixels, options.max_pixels, parse_transforms(options.preprocess)),
        parse_augment(options.augment) if options.augment else None,
        options.seed,
        options.epoch,
    )
    try:
        fonts = Fonts.load(options.font)
    except OSError as error:
        raise ConfigError(f"--font {options.font}: no readable font file ({error})") from error
    indexes = [open_index(shard, options.index_dir) for shard in expand(options.shards)]
    options.out.mkdir(parents=True, exist_ok=True)
    num_drawn = 0
    for index, row in choose(indexes, options.num, options.seed, options.key):
        try:
            paths = draw(index.read(row), view, options.out, fonts)
        except DataError as error:
            print(f"{index.path}, left out: {error}", file=sys.stderr)
            continue
        num_drawn += 1
        print("\n".join(map(str, paths)))
    if not num_drawn:
        raise DataError("no sample could be drawn, see above")
    return 0


def parse_augment(text: str) -> Augmentation:
    """Return the augmentation of `rotate_deg=2,noise_sigma=6`.

    Raises:
        ConfigError: if a name is unknown or a value is no number of at least 0.
    """
    names = [part.name for part in dataclasses.fields(Augmentation)]
    values = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name.strip() not in names or not number >= 0:
            raise ConfigError(
                f"--augment {part}: expected NAME=NUMBER, NAME one of {', '.join(names)}"
            )
        values[name.strip()] = number
    return Augmentation(**values)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: if a number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.peek",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="paths, URLs, globs, braces")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the pictures")
    parser.add_argument("--num", type=int, default=8, help="samples that are drawn (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the augmentation")
    parser.add_argument("--key", help="draw this sample only")
    pages = parser.add_argument_group("pages, as in the section `data` of a configuration")
    pages.add_argument("--min-pixels", type=int, default=MIN_PIXELS, help=f"({MIN_PIXELS})")
    pages.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help=f"({MAX_PIXELS})")
    pages.add_argument("--preprocess", nargs="+", default=[], metavar="NAME|YAML")
    pages.add_argument("--augment", default="", metavar="NAME=X[,...]", help="none by default")
    pages.add_argument("--epoch", type=int, default=0, help="the augmentation of this epoch (0)")
    parser.add_argument("--font", metavar="FILE", help="for texts that are not Latin")
    parser.add_argument("--index-dir", metavar="DIR", help="of indexes not beside the shards")
    options = parser.parse_args(arguments)
    if options.num < 1 or options.epoch < 0 or not 0 < options.min_pixels <= options.max_pixels:
        raise ConfigError(
            "--num must be at least 1, --epoch at least 0, and --min-pixels at most --max-pixels"
        )
    return options


if __name__ == "__main__":
    run_command(main)
