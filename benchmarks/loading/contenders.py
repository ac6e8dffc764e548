"""Ways from a shard to the pixels of its pages; each is an iterator over a whole page set.

All of them read the same tar, parse each sample's JSON and leave one page after the other ready for
the model. The others' tensors come page by page; ours are joined into packs besides.
"""

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.loading import environment
from benchmarks.loading.pages import PageSet
from data_tools.errors import LecternError
from data_tools.examples.encode import ImageSettings, grid_of
from data_tools.examples.images import PATCH_PX, PixelMode, decode
from data_tools.stream.ranges import RangeReader
from data_tools.stream.source import Source
from train.modeling.pixels import PixelNormalizer, patchify

MIN_PIXELS, MAX_PIXELS = 3136, 12_845_056  # of the published checkpoint
PAGES_PER_PACK = 8
BYTES_PER_PATCH = 3 * PATCH_PX**2
MODES: tuple[PixelMode, ...] = ("exact", "fast")
PREPARE_ENERGON = """
import sys
sys.path.append(sys.argv.pop(1))
from megatron.energon.cli.main import main
main()
"""


@dataclass(frozen=True)
class Contender:
    """One way to load pages.

    Attributes:
        name: key in the report.
        run: loads every page of the set once; yields what would go through the worker queue.
    """

    name: str
    run: Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class Pixels:
    """A pack's images as ours go through the queue.

    Attributes:
        flat: uint8, the resized (H, W, 3) images one after the other.
        grid_thw: (I, 3) int64.
    """

    flat: Tensor
    grid_thw: Tensor


def contenders_for(pages: PageSet, source: Source) -> list[Contender]:
    """Return those that can run here; what is not installed is left out.

    Args:
        pages: the page set.
        source: the same pages, for ours.
    """
    normalizer = image_normalizer()
    found = [Contender("hf_slow", hf_pages(pages, "pil"))]
    if environment.has_torchvision():
        found.append(Contender("hf_fast", hf_pages(pages, "torchvision")))
    if environment.has_energon():
        found.append(Contender("peer", energon_pages(pages)))
    for mode in MODES:
        run = own_packs(source, mode)
        found.append(Contender(mode, run))
        found.append(Contender(f"{mode}_finished", finished(run, normalizer)))
    return found


def hf_processor(backend: str) -> Any:
    """Return a processor of transformers, `pil` or `torchvision`, with the published limits."""
    import transformers

    name = "Qwen2VLImageProcessorPil" if backend == "pil" else "Qwen2VLImageProcessor"
    return getattr(transformers, name)(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)


def image_normalizer() -> PixelNormalizer:
    """Return our normalisation with the processor's mean and standard deviation."""
    processor = hf_processor("pil")
    return PixelNormalizer(list(processor.image_mean), list(processor.image_std))


def hf_pages(pages: PageSet, backend: str) -> Callable[[], Iterator[Tensor]]:
    """Return a reader of (P, 1176) float32 patches: stock webdataset, PIL decode, a processor."""
    import webdataset

    processor = hf_processor(backend)

    def run() -> Iterator[Tensor]:
        dataset = webdataset.WebDataset([pages.shard], shardshuffle=False).decode("pilrgb")
        for sample in dataset:
            yield processor(images=[sample["jpg"]], return_tensors="pt")["pixel_values"]

    return run


def energon_pages(pages: PageSet) -> Callable[[], Iterator[Tensor]]:
    """Return a reader of (P, 1176) float32 patches: Megatron-Energon, PIL decode and processor.

    Energon's own index (`energon prepare`) and its start are not part of what is measured: the
    reader goes on, epoch after epoch.
    """
    folder = Path(pages.shard).parent
    _prepare_energon(folder)
    from megatron import energon

    processor = hf_processor("pil")

    class Encoder(energon.DefaultTaskEncoder):
        decoder = energon.SampleDecoder(image_decode="pilrgb")
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]

        @energon.stateless
        def encode_sample(self, sample: Any) -> Tensor:
            return processor(images=[sample["jpg"]], return_tensors="pt")["pixel_values"]

    workers = energon.WorkerConfig(
        rank=0, world_size=1, num_workers=0, global_error_handler=energon.reraise_exception
    )
    dataset = energon.get_train_dataset(
        folder,
        split_part="val",
        worker_config=workers,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'pin_memory' argument")
        # Without its garbage collection every ten steps, which takes longer the more a process has
        # imported, and this one has imported all contenders.
        stream = iter(energon.get_savable_loader(dataset, gc_collect_every_n_steps=0))
        for _ in range(pages.num_pages):  # the first epoch, with all that starting costs
            next(stream)

    def run() -> Iterator[Tensor]:
        yield from itertools.islice(stream, pages.num_pages)

    return run


def own_packs(source: Source, mode: PixelMode) -> Callable[[], Iterator[Pixels]]:
    """Return a reader of packs: byte ranges, parse, decode, prepare, joined flat uint8 pixels."""
    settings = ImageSettings(MIN_PIXELS, MAX_PIXELS, mode=mode)
    reader = RangeReader()

    def run() -> Iterator[Pixels]:
        ids = source.used.tolist()
        for first in range(0, len(ids), PAGES_PER_PACK):
            pack = ids[first : first + PAGES_PER_PACK]
            images: list[np.ndarray] = []
            ranges = [source.byte_range(sample_id) for sample_id in pack]
            for sample_id, data in zip(pack, reader.read_many(ranges), strict=True):
                sample = source.parse(sample_id, data)
                images += [settings.prepare(decode(content)) for content in sample.image_bytes]
            flat = np.concatenate([image.reshape(-1) for image in images])
            yield Pixels(torch.from_numpy(flat), torch.from_numpy(grid_of(tuple(images))))

    return run


def finished(
    run: Callable[[], Iterator[Pixels]], normalizer: PixelNormalizer
) -> Callable[[], Iterator[Tensor]]:
    """Return a reader that does on the CPU what training leaves to the device.

    It yields (P, 1176) float32 patches page by page, as the others do.
    """

    def run_and_finish() -> Iterator[Tensor]:
        for pack in run():
            sizes = pack.grid_thw.prod(dim=1) * BYTES_PER_PATCH
            pages = zip(pack.flat.split(sizes.tolist()), pack.grid_thw.split(1), strict=True)
            for pixels, grid in pages:
                yield patchify(pixels, grid, normalizer)

    return run_and_finish


def _prepare_energon(folder: Path) -> None:
    """Index the tars of a folder for Energon, in a process of its own.

    Raises:
        LecternError: if Energon fails.
    """
    command = [sys.executable, "-c", PREPARE_ENERGON, str(environment.FOLDER), "prepare"]
    options = ["--non-interactive", "--force-overwrite", "--no-progress", "--num-workers", "1"]
    kind = ["--split-parts", "val:.*", "--sample-type", "CrudeWebdataset"]
    done = subprocess.run(
        [*command, str(folder), *options, *kind],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise LecternError(f"energon prepare {folder} failed: {done.stderr.strip()[-2000:]}")
