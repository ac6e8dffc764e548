"""Build WebDataset shards from annotated documents.

    python -m data_tools.build DATA SHARDS
    python -m data_tools.build DATA/labels.jsonl SHARDS --shard-mb 500 --workers 32
    python -m data_tools.build DATA LINES --unit line --margin 3,2
    python -m data_tools.build DATA SHARDS --part 3/16        # the fourth of 16 parts

SHARDS/train-000000.tar and so on hold one sample a document, images byte for byte as they came;
with `--unit line` one sample a text line, cut out of its page. Each shard gets its index. What
cannot be used is listed in SHARDS/rejected.jsonl and counted at the end. Typed again after an
interruption, the command goes on with the shards that are missing. With `--part K/N`, K from 0, a
process builds its share of them; the part that finds all shards built writes the summary.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import fsspec
import fsspec.core

from data_tools.errors import BadDataShareError, ConfigError, DataError, run_command
from data_tools.formats import FORMATS, Rejection, SourceDocument, detect
from data_tools.jobs import num_usable_cores, run_jobs
from data_tools.output import claim_folder, exists, join, make_folder, write_file
from data_tools.shards import LineOptions, ShardJob, ShardReport, build_shard, report_path

RECORD_NAME = "build.json"
REJECTED_NAME = "rejected.jsonl"
SUMMARY_NAME = "summary.json"
DEFAULT_MAX_REJECTED = 0.05
DEFAULT_MARGIN = "3,2"

_SIZE_THREADS = 16
_LINE_OVERHEAD_BYTES = 2048  # tar headers, padding and JSON of a line sample
_BYTES_PER_LINE_PIXEL = 0.5  # of a grey PNG


@dataclass(frozen=True)
class Summary:
    """What a build did, as written to summary.json.

    Attributes:
        documents: entries in the source.
        rejected_documents: those that gave no sample.
        samples: samples written.
        shards: shards written.
        rejected: number of rejections by reason, of documents and annotations.
    """

    documents: int
    rejected_documents: int
    samples: int
    shards: int
    rejected: dict[str, int]

    @property
    def rejected_share(self) -> float:
        """Share of the documents that gave no sample."""
        return self.rejected_documents / self.documents

    def __str__(self) -> str:
        """Return the summary for people."""
        lines = [
            f"documents read  {self.documents}",
            f"samples written {self.samples} in {self.shards} shards",
            f"rejected        {self.rejected_documents} documents",
        ]
        reasons = sorted(self.rejected.items(), key=lambda item: (-item[1], item[0]))
        return "\n".join(lines + [f"  {count:>6} x {reason}" for reason, count in reasons])


def build(
    source: str,
    out: str,
    format_name: str | None = None,
    line_options: LineOptions | None = None,
    shard_bytes: int = 100_000_000,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
) -> Summary | None:
    """Build the shards of a source into a folder, or what is missing of them.

    Args:
        source: path or URL of the annotations.
        out: folder or URL for the shards.
        format_name: one of `FORMATS`; None finds out.
        line_options: cut pages into lines; None keeps whole pages.
        shard_bytes: size that shards aim at.
        workers: processes.
        part: (K, N): build every N-th shard from the K-th on; other processes build the others.

    Returns:
        What was built, by all parts; None while shards of other parts are missing.

    Raises:
        ConfigError: if the format is unknown or `out` was begun with other settings.
        DataError: if the source holds no document.
    """
    format_name = format_name or detect(source)
    documents, refused = _read(source, format_name)
    plan = plan_shards(documents, shard_bytes, is_line_unit=line_options is not None)
    settings = {
        "source": source if "://" in source else os.path.abspath(source),
        "format": format_name,
        "unit": "page" if line_options is None else "line",
        "margin": None if line_options is None else list(line_options.margin_xy),
        "shard_bytes": shard_bytes,
        "documents": f"{len(documents)}, digest {_digest(documents)}",
    }
    claim_folder(out, RECORD_NAME, settings)
    finished = _finished_summary(out)
    if finished is not None:
        print(f"{out}: already built, nothing to do", file=sys.stderr)
        return finished
    jobs = [
        ShardJob(join(out, name), tuple(document for document, _ in shard), line_options)
        for name, shard in plan.items()
    ]
    make_folder(report_path(jobs[0].path).rsplit("/", 1)[0])
    number, num_parts = part
    for _ in run_jobs(build_shard, _missing(jobs[number::num_parts]), workers, "shards"):
        pass
    # A part writes its reports before it looks: whichever looks last finds all of them.
    if num_missing := len(_missing(jobs)):
        print(
            f"part {number} of {num_parts} is built; {num_missing} of {len(jobs)} shards are still "
            "missing, the last part writes the summary",
            file=sys.stderr,
        )
        return None
    return _finish(out, jobs, len(documents) + _num_lost(refused), refused)


def plan_shards(
    documents: Sequence[tuple[SourceDocument, int]], shard_bytes: int, is_line_unit: bool = False
) -> dict[str, list[tuple[SourceDocument, int]]]:
    """Return shard name -> its (document, image bytes), in the order of the source.

    A shard is closed before the document that would carry it past `shard_bytes`. The plan depends
    on nothing but the documents and the sizes of their image files.
    """
    plan: dict[str, list[tuple[SourceDocument, int]]] = {}
    open_shards: dict[str, tuple[int, int]] = {}  # split -> (number, bytes so far)
    for document, image_bytes in documents:
        cost = _line_bytes(document) if is_line_unit else image_bytes
        number, filled = open_shards.get(document.split, (0, 0))
        if filled and filled + cost > shard_bytes:
            number, filled = number + 1, 0
        open_shards[document.split] = (number, filled + cost)
        name = f"{document.split}-{number:06d}.tar"
        plan.setdefault(name, []).append((document, image_bytes))
    return plan


def _line_bytes(document: SourceDocument) -> int:
    boxes = [annotation.bbox for annotation in document.annotations if annotation.bbox is not None]
    pixels = sum(max(0, x2 - x1) * max(0, y2 - y1) for x1, y1, x2, y2 in boxes)
    return round(pixels * _BYTES_PER_LINE_PIXEL) + _LINE_OVERHEAD_BYTES * len(boxes)


def _read(
    source: str, format_name: str
) -> tuple[list[tuple[SourceDocument, int]], list[Rejection]]:
    """Return the documents with the bytes of their images, and what is refused already."""
    if not exists(source):
        raise ConfigError(f"{source}: no such file or folder")
    entries = list(FORMATS[format_name].read(source))
    read = [entry for entry in entries if isinstance(entry, SourceDocument)]
    refused = [entry for entry in entries if isinstance(entry, Rejection)]
    with ThreadPoolExecutor(_SIZE_THREADS) as threads:
        sizes = list(threads.map(_image_bytes, read))
    documents = []
    for document, size in zip(read, sizes, strict=True):
        if isinstance(size, Rejection):
            refused.append(size)
        else:
            documents.append((document, size))
    if not documents:
        reasons = Counter(rejection.reason for rejection in refused)
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        raise DataError(
            f"{source}: no usable document as format {format_name} ({why or 'it is empty'})"
        )
    return documents, refused


def _image_bytes(document: SourceDocument) -> int | Rejection:
    """Return the bytes of a document's images, or its rejection if one is missing."""
    total = 0
    for path in document.image_paths:
        filesystem, inner = fsspec.core.url_to_fs(path)
        try:
            total += int(filesystem.size(inner) or 0)
        except OSError:
            return Rejection(document.where, "image missing", path, document.key)
    return total


def _digest(documents: list[tuple[SourceDocument, int]]) -> str:
    """Return a digest of the documents and the sizes of their images: they decide the plan."""
    digest = hashlib.sha256()
    for document, image_bytes in documents:
        content = json.dumps([image_bytes, asdict(document)], sort_keys=True, default=str)
        digest.update(content.encode("utf-8"))
    return digest.hexdigest()[:16]


def _missing(jobs: Sequence[ShardJob]) -> list[ShardJob]:
    """Return the jobs whose shards are not finished."""
    with ThreadPoolExecutor(_SIZE_THREADS) as threads:
        are_done = list(threads.map(exists, [report_path(job.path) for job in jobs]))
    return [job for job, is_done in zip(jobs, are_done, strict=True) if not is_done]


def _finished_summary(out: str) -> Summary | None:
    path = join(out, SUMMARY_NAME)
    if not exists(path):
        return None
    with fsspec.open(path, "rt", encoding="utf-8") as stream:
        return Summary(**json.load(stream))


def _finish(
    out: str, jobs: list[ShardJob], num_documents: int, refused: list[Rejection]
) -> Summary:
    """Write rejected.jsonl and summary.json from the reports of all shards."""
    reports = []
    for job in jobs:
        with fsspec.open(report_path(job.path), "rt", encoding="utf-8") as stream:
            reports.append(ShardReport(**json.load(stream)))
    records = [rejection.to_json() for rejection in refused]
    records += [record for report in reports for record in report.rejected]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file(join(out, REJECTED_NAME), text.encode("utf-8"))
    summary = Summary(
        documents=num_documents,
        rejected_documents=sum(record["scope"] == "document" for record in records),
        samples=sum(report.samples for report in reports),
        shards=sum(report.samples > 0 for report in reports),
        rejected=dict(Counter(record["reason"] for record in records)),
    )
    write_file(join(out, SUMMARY_NAME), json.dumps(asdict(summary), indent=2).encode("utf-8"))
    return summary


def _num_lost(refused: Iterable[Rejection]) -> int:
    return sum(rejection.scope == "document" for rejection in refused)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: if an option contradicts another one or is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="annotations: a file, folder or URL")
    parser.add_argument("out", metavar="OUT", help="folder or URL for the shards")
    parser.add_argument("--unit", choices=("page", "line"), default="page")
    parser.add_argument("--format", choices=tuple(FORMATS), help="default: found out from SRC")
    parser.add_argument("--shard-mb", type=float, default=100.0, help="size that shards aim at")
    parser.add_argument("--workers", type=int, default=num_usable_cores())
    parser.add_argument(
        "--part", metavar="K/N", default="0/1", help="build the share K of N, from 0"
    )
    parser.add_argument(
        "--margin",
        metavar="PX[,PX]",
        help=f"lines only: grow boxes by this, across and up and down (default {DEFAULT_MARGIN})",
    )
    parser.add_argument(
        "--max-rejected",
        type=float,
        default=DEFAULT_MAX_REJECTED,
        metavar="SHARE",
        help=f"exit with 65 if more of the documents are rejected ({DEFAULT_MAX_REJECTED})",
    )
    options = parser.parse_args(arguments)
    if options.shard_mb <= 0 or options.workers < 1:
        raise ConfigError("--shard-mb must be above 0 and --workers at least 1")
    if options.margin is not None and options.unit != "line":
        raise ConfigError("--margin belongs to --unit line")
    return options


def parse_margin(text: str) -> tuple[int, int]:
    """Return (across, up and down) in pixels from `3` or `3,2`.

    Raises:
        ConfigError: if it is neither.
    """
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--margin {text}: expected whole pixels as 3 or 3,2")
    return int(parts[0]), int(parts[-1])


def parse_part(text: str) -> tuple[int, int]:
    """Return (K, N) from `K/N`.

    Raises:
        ConfigError: if it is not a share, counted from 0.
    """
    number, separator, count = text.partition("/")
    if not (separator and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--part {text}: expected K/N with K from 0 to N - 1, as 0/16")
    return int(number), int(count)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code.

    Raises:
        BadDataShareError: if more of the documents are rejected than --max-rejected allows.
    """
    options = parse_arguments(arguments)
    line_options = None
    if options.unit == "line":
        line_options = LineOptions(parse_margin(options.margin or DEFAULT_MARGIN))
    summary = build(
        options.source,
        options.out,
        options.format,
        line_options,
        round(options.shard_mb * 1e6),
        options.workers,
        parse_part(options.part),
    )
    if summary is None:
        return 0
    print(summary)
    if summary.rejected_share > options.max_rejected:
        raise BadDataShareError(
            f"{options.source}: {summary.rejected_documents} of {summary.documents} documents "
            f"({summary.rejected_share:.1%}) were rejected, more than {options.max_rejected:.1%}; "
            f"the others are written. See {join(options.out, REJECTED_NAME)}, mend the source, or "
            "accept the loss with --max-rejected SHARE"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
