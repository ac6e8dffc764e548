"""One shard of a build: documents are checked against their images and become samples.

This is the part of `data_tools.build` that runs in worker processes. A shard is finished when its
report lies in OUT/reports; until then it is built again.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from itertools import chain
from typing import Any

import fsspec
from PIL import Image

from data_tools.errors import DataError
from data_tools.examples.images import MAX_ASPECT, decode, oriented_size
from data_tools.formats import Rejection, SourceDocument
from data_tools.output import join, write_file, write_shard
from data_tools.sample import IMAGE_EXTENSIONS, Annotation, Box, PageImage, Sample

CLIP_PX = 3  # a box that leaves the page by no more than this is clipped

_PNG_LEVEL = 3  # a tenth larger than the default, at a third of its time


@dataclass(frozen=True)
class LineOptions:
    """How pages are cut into lines: boxes grow by (across, up and down) pixels."""

    margin_xy: tuple[int, int]


@dataclass(frozen=True)
class ShardJob:
    """One shard to build: where, from what, and whether by line."""

    path: str
    documents: tuple[SourceDocument, ...]
    line_options: LineOptions | None = None


@dataclass
class ShardReport:
    """What became of a shard's documents; `rejected` holds lines of rejected.jsonl."""

    samples: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)


class _UnusableError(Exception):
    """A document gives no sample: (reason in general words, detail)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def report_path(shard: str) -> str:
    """Return where the report of a shard lies."""
    folder, name = shard.rsplit("/", 1)
    return join(folder, f"reports/{name.removesuffix('.tar')}.json")


def build_shard(job: ShardJob) -> str:
    """Build one shard, its index and its report; return its path.

    A shard of which nothing is usable is not written at all, only reported.
    """
    from data_tools.stream.index import index_shard

    report = ShardReport()
    samples = _samples(job, report)
    first = next(samples, None)
    if first is not None:
        report.samples = write_shard(job.path, chain([first], samples))
        index_shard(job.path)
    content = json.dumps(asdict(report), ensure_ascii=False)
    write_file(report_path(job.path), content.encode("utf-8"))
    return job.path


def _samples(job: ShardJob, report: ShardReport) -> Iterator[Sample]:
    for document in job.documents:
        try:
            page_sample = to_sample(document, report)
            if job.line_options is None:
                yield page_sample
            else:
                yield from cut_lines(page_sample, job.line_options)
        except _UnusableError as error:
            rejection = Rejection(document.where, error.reason, error.detail, document.key)
            report.rejected.append(rejection.to_json())


def to_sample(document: SourceDocument, report: ShardReport) -> Sample:
    """Return a document as a sample with its images, its annotations checked; fill the report."""
    images, contents = [], []
    for path in document.image_paths:
        page, content = _read_image(path)
        images.append(page)
        contents.append(content)
    _check_declared_size(document, images[0])
    annotations = []
    for number, annotation in enumerate(document.annotations):
        try:
            annotations.append(_checked(annotation, images[annotation.image]))
        except _UnusableError as error:
            place = f"{document.where}, annotation {number}"
            rejection = Rejection(place, error.reason, error.detail, document.key, "annotation")
            report.rejected.append(rejection.to_json())
    if not (annotations or document.fields or document.text or document.messages):
        raise _UnusableError("nothing to learn: no annotation, field, text or message")
    sample = Sample(
        key=document.key,
        images=tuple(images),
        annotations=tuple(annotations),
        fields=document.fields,
        text=document.text,
        messages=document.messages,
        tags=document.tags,
        source=document.source,
        image_bytes=tuple(contents),
    )
    if problems := sample.problems():
        raise _UnusableError("breaks the contract of a sample", problems[0])
    return sample


def cut_lines(page_sample: Sample, options: LineOptions) -> Iterator[Sample]:
    """Yield one sample for each annotation with a box, in the order of the page.

    The key is that of the document and the annotation's number; the tags say which document and
    where on it, so that a page can be put together again.
    """
    pages: dict[int, Image.Image] = {}
    has_line = False
    for number, annotation in enumerate(page_sample.annotations):
        if annotation.bbox is None:
            continue
        has_line = True
        if annotation.image not in pages:
            pages[annotation.image] = _decode_page(page_sample, annotation.image)
        page = pages[annotation.image]
        crop = page.crop(_grown(annotation.bbox, options.margin_xy, page.size))
        key = f"{page_sample.key}-{number:04d}"
        where: dict[str, Any] = {"document": page_sample.key, "box": list(annotation.bbox)}
        if len(page_sample.images) > 1:
            where["image"] = annotation.image
        yield Sample(
            key=key,
            images=(PageImage(f"{key}.png", *crop.size),),
            annotations=(replace(annotation, bbox=(0, 0, *crop.size), image=0, line=None),),
            tags=page_sample.tags | where,
            source=page_sample.source,
            image_bytes=(_encode_png(crop),),
        )
    if not has_line:
        raise _UnusableError("no line: no annotation has a box")


def _read_image(path: str) -> tuple[PageImage, bytes]:
    name = path.rsplit("/", 1)[-1]
    if name.rsplit(".", 1)[-1].lower() not in IMAGE_EXTENSIONS:
        raise _UnusableError(f"image type is none of {', '.join(IMAGE_EXTENSIONS)}", name)
    try:
        with fsspec.open(path, "rb") as stream:
            content = stream.read()
    except OSError as error:
        raise _UnusableError("image missing", f"{path}: {error}") from error
    try:
        width, height = oriented_size(content, name)
    except DataError as error:
        raise _UnusableError(
            "image without readable header, or of absurd size", str(error)
        ) from error
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _UnusableError(
            f"image more than {MAX_ASPECT} times as long as wide", f"{width} x {height} px"
        )
    return PageImage(name, width, height), content


def _check_declared_size(document: SourceDocument, page: PageImage) -> None:
    """Refuse boxes that were made on an image of another size, or on the unrotated one."""
    if document.declared_size not in (None, (page.width, page.height)):
        raise _UnusableError(
            "declared width and height are not those of the image",
            f"{document.declared_size} against {(page.width, page.height)} px as seen",
        )


def _checked(annotation: Annotation, page: PageImage) -> Annotation:
    if not annotation.text.strip():
        raise _UnusableError("empty text")
    if annotation.bbox is None:
        return annotation
    x1, y1, x2, y2 = annotation.bbox
    if x1 >= x2 or y1 >= y2:
        raise _UnusableError("empty box", f"{list(annotation.bbox)}")
    excess = max(-x1, -y1, x2 - page.width, y2 - page.height)
    clipped = (max(0, x1), max(0, y1), min(page.width, x2), min(page.height, y2))
    if excess > CLIP_PX or clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise _UnusableError(
            f"box leaves the page by more than {CLIP_PX} px",
            f"{list(annotation.bbox)} on {page.width} x {page.height} px",
        )
    return replace(annotation, bbox=clipped)


def _grown(box: Box, margin_xy: tuple[int, int], page_wh: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = box
    dx, dy = margin_xy
    return max(0, x1 - dx), max(0, y1 - dy), min(page_wh[0], x2 + dx), min(page_wh[1], y2 + dy)


def _decode_page(page_sample: Sample, number: int) -> Image.Image:
    """Decode a page, oriented; grey stays grey, so that its crops are a third of the size."""
    content = page_sample.image_bytes[number]
    try:
        page = Image.fromarray(decode(content, page_sample.images[number].file))
    except DataError as error:
        raise _UnusableError("image cannot be decoded", str(error)) from error
    with Image.open(BytesIO(content)) as header:
        is_gray = header.mode in ("1", "L")
    return page.convert("L") if is_gray else page


def _encode_png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG", compress_level=_PNG_LEVEL)
    return stream.getvalue()
