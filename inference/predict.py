"""Read documents with an exported model; JSON lines on stdout, into a file, or in parts.

    python -m inference.predict RUN/stage2/hf scan.jpg receipts/ > read.jsonl
    python -m inference.predict RUN/stage2/hf labels.jsonl --out read.jsonl --device cpu
    python -m inference.predict RUN/stage2/hf labels.jsonl --boxes --batch-size 32
    python -m inference.predict RUN/stage2/hf 's3://bucket/scans/*.png' --out read/ --part 3/64
    python -m inference.predict RUN/stage2/hf --list pages.txt --out s3://bucket/read/

Takes images, folders of images, annotation files, globs of these, and lists of images, all of them
paths or URLs. A line reader reads the boxes of annotation files one by one and takes a plain image
for one line; a page reader does so with --boxes. Each document gives one line: {"file", "text"},
with "fields" or "lines" where the template asks for them, "finished": false where the answer was
cut off; {"file", "error"} if it cannot be read. The command ends with 65 if more than --max-errors
could not be read.

An OUT without an extension is a folder, for long work: OUT/part-00003-of-00064.jsonl. Interrupted
by USR1 or TERM, a part finishes its batch and ends with 75; typed again, it goes on after its last
line, or says that it is done. Each of N machines reads its part, given as --part K/N, K from 0.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain, islice, takewhile
from types import FrameType
from typing import Any, TextIO

import fsspec
import numpy as np

from data_tools.errors import (
    EXIT_AGAIN,
    EXIT_DATA,
    EXIT_DONE,
    ConfigError,
    DataError,
    run_command,
)
from data_tools.output import make_folder
from inference.documents import Document, find_documents
from inference.parts import Part, close_part, finished, missing, open_part
from inference.progress import Progress
from inference.reader import DEFAULT_BATCH_SIZE, Reader, Reading, Request, join_lines

BATCHES_AHEAD = 4  # documents sorted by length together, so that batches are even
READ_AT_A_TIME = 16  # documents, from storage that takes its time for each
MAX_ERRORS_IN_PARTS = 0.05  # among millions of scans there is always a broken one


def predict(
    reader: Reader,
    documents: Iterable[Document],
    *,
    template: str | None = None,
    read_boxes: bool = False,
    max_new_tokens: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the result of each document, in order.

    Args:
        reader: of the model.
        documents: what to read.
        template: name or path; None: the model's own.
        read_boxes: read the boxes of a document one by one; a line reader always does.
        max_new_tokens: limit of each answer.
    """
    remaining = iter(documents)
    with ThreadPoolExecutor(READ_AT_A_TIME) as threads:
        while chunk := list(islice(remaining, BATCHES_AHEAD * reader.batch_size)):
            requests: dict[int, Request] = {}
            errors: dict[int, str] = {}
            for number, pages in enumerate(threads.map(_pages, chunk)):
                boxes = chunk[number].boxes if read_boxes or reader.unit == "line" else ()
                try:
                    if isinstance(pages, DataError):
                        raise pages
                    requests[number] = reader.prepare(pages, boxes, template)
                except DataError as error:
                    errors[number] = str(error)
            answers = reader.answer(list(requests.values()), max_new_tokens)
            readings = dict(zip(requests, answers, strict=True))
            for number, document in enumerate(chunk):
                if number in errors:
                    yield {"file": document.name, "error": errors[number]}
                else:
                    yield _record(document, join_lines(requests[number], readings[number]))


def _pages(document: Document) -> list[np.ndarray] | DataError:
    """Return the pages, or what is wrong with them: one bad document must not end the others."""
    try:
        return document.pages()
    except DataError as error:
        return error


def _record(document: Document, reading: Reading) -> dict[str, Any]:
    record: dict[str, Any] = {"file": document.name, "text": reading.text}
    if len(document.files) > 1:
        record["files"] = list(document.files)
    if reading.fields is not None:
        record["fields"] = reading.fields
    if reading.lines is not None:
        record["lines"] = [
            {"bbox": list(line.bbox), "text": line.text}
            | ({"image": line.image} if len(document.files) > 1 else {})
            for line in reading.lines
        ]
    return record if reading.finished else record | {"finished": False}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parse(arguments)
    return _read_part(options) if _is_in_parts(options) else _read_at_once(options)


def _read_at_once(options: argparse.Namespace) -> int:
    """Read every document to stdout or into one file, which is written anew."""
    documents = find_documents(options.paths, options.list)
    results = _results(options, documents)
    num_documents = num_errors = 0
    with ExitStack() as stack:
        out: TextIO = sys.stdout
        if options.out:
            folder = options.out.rpartition("/")[0]
            if folder:
                make_folder(folder)
            out = stack.enter_context(fsspec.open(options.out, "wt", encoding="utf-8"))
        progress = stack.enter_context(Progress(None, "document"))
        for record in results:
            print(json.dumps(record, ensure_ascii=False), file=out, flush=True)
            num_documents += 1
            num_errors += "error" in record
            progress.update(1)
    return _end(options, num_documents, num_errors)


def _read_part(options: argparse.Namespace) -> int:
    """Read what is missing of a part; see the module docstring."""
    out, part = options.out.rstrip("/"), Part.parse(options.part or "0/1")
    counts = finished(out, part)
    if counts is not None:
        print(f"{out}: {part.name} is done already", file=sys.stderr)
        return _end(options, **counts)
    documents = find_documents(options.paths, options.list)
    settings = {
        "model": os.path.abspath(options.model),
        "template": options.template,
        "boxes": options.boxes,
        "max_new_tokens": options.max_new_tokens,
        "paths": options.paths,
        "lists": options.list,
    }
    with _signals_noted() as noted, open_part(out, part, settings) as lines:
        if lines.done:
            print(f"{part.name}: {lines.done.total()} documents are read", file=sys.stderr)
        remaining = missing(documents, part, lines.done)
        with Progress(None, "document") as progress:
            for record in _results(options, takewhile(lambda _: not noted, remaining)):
                lines.write([record])
                progress.update(1)
        if noted:
            name = signal.Signals(noted[0]).name
            print(f"{name}: {part.name} is interrupted; start it again to go on", file=sys.stderr)
            return EXIT_AGAIN
        return _end(options, **close_part(out, part, lines))


def _results(
    options: argparse.Namespace, documents: Iterator[Document]
) -> Iterator[dict[str, Any]]:
    """Yield the result of each document; the model is loaded if there is one."""
    first = next(documents, None)
    if first is None:
        return
    reader = Reader.load(options.model, device=options.device, batch_size=options.batch_size)
    yield from predict(
        reader,
        chain((first,), documents),
        template=options.template,
        read_boxes=options.boxes,
        max_new_tokens=options.max_new_tokens,
    )


def _end(options: argparse.Namespace, documents: int, errors: int) -> int:
    """Say how many documents could not be read; return the exit code."""
    print(f"{documents} documents, {errors} could not be read", file=sys.stderr)
    default = MAX_ERRORS_IN_PARTS if _is_in_parts(options) else 0.0
    share = default if options.max_errors is None else options.max_errors
    return EXIT_DATA if errors > share * documents else EXIT_DONE


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Collect USR1 and TERM instead of dying of them, until the block is left."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_parts(options: argparse.Namespace) -> bool:
    """Whether OUT is a folder of parts: one with --part, or without an extension."""
    out = options.out or ""
    is_folder = out.endswith("/") or "." not in out.rsplit("/", 1)[-1] or os.path.isdir(out)
    return bool(out) and (options.part is not None or is_folder)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m inference.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="HF_DIR", help="exported model folder")
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", help="image, folder, annotation file or glob of these"
    )
    parser.add_argument(
        "--list", metavar="FILE", action="append", default=[], help="text file, an image a line"
    )
    parser.add_argument("--boxes", action="store_true", help="read each annotated box by itself")
    parser.add_argument("--template", metavar="NAME", help="default: the one it was trained with")
    parser.add_argument("--out", metavar="OUT", help="file, or folder of parts; default: stdout")
    parser.add_argument("--part", metavar="K/N", help="read this share of the documents, from 0")
    parser.add_argument(
        "--max-errors",
        type=float,
        metavar="SHARE",
        help=f"exit with 65 above it; default: 0, in parts {MAX_ERRORS_IN_PARTS}",
    )
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH_SIZE)
    parser.add_argument("--max-new-tokens", type=int, help="limit of each answer")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    options = parser.parse_intermixed_args(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: must be at least 1")
    if not options.paths and not options.list:
        raise ConfigError("nothing to read: give paths or URLs, or --list FILE")
    if options.part is not None and not options.out:
        raise ConfigError("--part: the parts need a folder, --out OUT")
    if options.part is not None and options.out.endswith((".json", ".jsonl")):
        raise ConfigError(f"--out {options.out}: with --part it is a folder of parts")
    return options


if __name__ == "__main__":
    run_command(main)
