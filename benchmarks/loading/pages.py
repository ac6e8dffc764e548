"""The benchmark's page sets: receipts as they are, and A4 pages composed of them, as shards.

Receipts are real (a folder with `labels.jsonl`) or drawn by `data_tools.synth`. An A4 page is
1.2 to 1.7 megapixels, colour, JPEG 4:2:0 of quality 90: pieces of receipts on tinted paper with a
coloured head. Everything is a pure function of the documents and the seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from data_tools.formats import FORMATS, SourceDocument, detect
from data_tools.output import write_shard
from data_tools.sample import Annotation, PageImage, Sample
from data_tools.shards import ShardReport, to_sample
from data_tools.stream.index import index_shard
from data_tools.synth.fonts import builtin_face
from data_tools.synth.pages import PageSettings, draw_document

A4_HEIGHTS_PX = (1304, 1550)  # 1.2 to 1.7 megapixels
A4_ASPECT = 2**0.5
JPEG_QUALITY = 90
PAPER_TINTS = ((252, 250, 244), (248, 250, 253), (250, 252, 247), (255, 255, 255))
INKS = ((38, 70, 120), (150, 40, 40), (30, 100, 70), (90, 60, 130))
MARGIN_PX = 40
HEAD_PX = 90


@dataclass(frozen=True)
class PageSet:
    """Pages in one shard.

    Attributes:
        name: `receipts` or `a4`.
        shard: path of the tar, indexed.
        num_pages: one image a sample.
        megapixels: of a page, mean.
        kilobytes: of an encoded page, mean.
        source: what the pages are, in words.
    """

    name: str
    shard: str
    num_pages: int
    megapixels: float
    kilobytes: float
    source: str


def make_page_sets(
    folder: Path, receipts: Path | None, num_pages: int, seed: int = 0
) -> list[PageSet]:
    """Write both page sets below a folder.

    Args:
        folder: to write to.
        receipts: a folder or file of annotated documents, or None for synthetic ones.
        num_pages: of each set.
        seed: which documents are taken, and how the A4 pages are composed.
    """
    samples = _real(receipts, num_pages, seed) if receipts else _synthetic(num_pages, seed)
    kind = "real receipts" if receipts else "synthetic receipts (data_tools.synth)"
    pages = [compose_a4(samples, number, seed) for number in range(len(samples))]
    return [
        _write(folder, "receipts", samples, kind),
        _write(folder, "a4", pages, f"composed of {kind}"),
    ]


def compose_a4(samples: Sequence[Sample], number: int, seed: int) -> Sample:
    """Return a colour A4 page with two columns of pieces of receipts."""
    draw = random.Random(f"{seed}:a4:{number}")
    height = draw.randrange(*A4_HEIGHTS_PX)
    width = round(height / A4_ASPECT)
    ink = draw.choice(INKS)
    page = Image.new("RGB", (width, height), draw.choice(PAPER_TINTS))
    canvas = ImageDraw.Draw(page)
    canvas.rectangle((MARGIN_PX, MARGIN_PX, width - MARGIN_PX, HEAD_PX), fill=ink)
    canvas.text((MARGIN_PX + 12, MARGIN_PX + 12), f"Page {number + 1}", "white", font_size=28)
    column = (width - 3 * MARGIN_PX) // 2
    for left in (MARGIN_PX, 2 * MARGIN_PX + column):
        top = HEAD_PX + MARGIN_PX
        while (room := height - MARGIN_PX - top) > MARGIN_PX:
            piece = _piece(draw.choice(samples), column, room)
            # Print takes the colour of the ink where it is dark and lets the paper through.
            page.paste(ink, (left, top), piece.point([255 - level for level in range(256)]))
            top += piece.height
    stream = BytesIO()
    page.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    key = f"a4-{number:05d}"
    return Sample(
        key=key,
        images=(PageImage(f"{key}.jpg", width, height),),
        annotations=(Annotation(f"Page {number + 1}"),),
        image_bytes=(stream.getvalue(),),
        source="composed",
    )


def _piece(sample: Sample, width: int, max_height: int) -> Image.Image:
    """Return a document's first page in grey, scaled to a width and cut off below."""
    page = Image.open(BytesIO(sample.image_bytes[0])).convert("L")
    page = page.resize((width, round(page.height * width / page.width)))
    return page.crop((0, 0, width, min(page.height, max_height)))


def _real(path: Path, num_pages: int, seed: int) -> list[Sample]:
    source = str(path)
    documents = [
        document
        for document in FORMATS[detect(source)].read(source)
        if isinstance(document, SourceDocument)
    ]
    documents.sort(key=lambda document: document.key)
    chosen = random.Random(seed).sample(documents, min(num_pages, len(documents)))
    return [to_sample(document, ShardReport()) for document in chosen]


def _synthetic(num_pages: int, seed: int) -> list[Sample]:
    face = (builtin_face().path,)
    samples = []
    for number in range(num_pages):
        record, image = draw_document(number, face, PageSettings("receipts", seed))
        stream = BytesIO()
        image.save(stream, "JPEG", quality=JPEG_QUALITY)
        key = f"receipt-{number:05d}"
        samples.append(
            Sample(
                key=key,
                images=(PageImage(f"{key}.jpg", *image.size),),
                annotations=tuple(
                    Annotation(line["text"], tuple(line["bbox"]), category=line["category"])
                    for line in record["annotations"]
                ),
                image_bytes=(stream.getvalue(),),
                source="synth",
            )
        )
    return samples


def _write(folder: Path, name: str, samples: Sequence[Sample], source: str) -> PageSet:
    # A folder of its own: Energon takes every tar of the folder that it prepares.
    (folder / name).mkdir(parents=True, exist_ok=True)
    shard = str(folder / name / f"{name}-000000.tar")
    write_shard(shard, samples)
    index_shard(shard)
    pixels = [page.width * page.height for sample in samples for page in sample.images]
    sizes = [len(data) for sample in samples for data in sample.image_bytes]
    count = len(samples)
    return PageSet(name, shard, count, sum(pixels) / count / 1e6, sum(sizes) / count / 1e3, source)
