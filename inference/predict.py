"""Read documents with an exported model; JSON lines on stdout.

    python -m inference.predict RUN/stage2/hf scan.jpg receipts/ > read.jsonl
    python -m inference.predict RUN/stage2/hf labels.jsonl --out read.jsonl --device cpu
    python -m inference.predict RUN/stage2/hf labels.jsonl --boxes --batch-size 32

Takes images, folders of images and annotation files. A line reader reads the boxes of annotation
files one by one and takes a plain image for one line; a page reader does so with --boxes. Each
document gives one line: {"file", "text"}, with "fields" or "lines" where the template asks for
them, "finished": false where the answer was cut off; {"file", "error"} if it cannot be read, and
the command then ends with 65.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any, TextIO

import fsspec

from data_tools.errors import EXIT_DATA, EXIT_DONE, ConfigError, DataError, run_command
from data_tools.output import make_folder
from inference.documents import Document, find_documents
from inference.progress import Progress
from inference.reader import DEFAULT_BATCH_SIZE, Reader, Reading, Request, join_lines

BATCHES_AHEAD = 4  # documents sorted by length together, so that batches are even


def predict(
    reader: Reader,
    documents: Sequence[Document],
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
    while chunk := list(islice(remaining, BATCHES_AHEAD * reader.batch_size)):
        requests: dict[int, Request] = {}
        errors: dict[int, str] = {}
        for number, document in enumerate(chunk):
            boxes = document.boxes if read_boxes or reader.unit == "line" else ()
            try:
                requests[number] = reader.prepare(document.pages(), boxes, template)
            except DataError as error:
                errors[number] = str(error)
        answers = reader.answer(list(requests.values()), max_new_tokens)
        readings = dict(zip(requests, answers, strict=True))
        for number, document in enumerate(chunk):
            if number in errors:
                yield {"file": document.name, "error": errors[number]}
            else:
                yield _record(document, join_lines(requests[number], readings[number]))


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
    documents = list(find_documents(options.paths))
    reader = Reader.load(options.model, device=options.device, batch_size=options.batch_size)
    results = predict(
        reader,
        documents,
        template=options.template,
        read_boxes=options.boxes,
        max_new_tokens=options.max_new_tokens,
    )
    num_errors = 0
    with ExitStack() as stack:
        out: TextIO = sys.stdout
        if options.out:
            folder = options.out.rpartition("/")[0]
            if folder:
                make_folder(folder)
            out = stack.enter_context(fsspec.open(options.out, "wt", encoding="utf-8"))
        progress = stack.enter_context(Progress(len(documents), "document"))
        for record in results:
            print(json.dumps(record, ensure_ascii=False), file=out, flush=True)
            num_errors += "error" in record
            progress.update(1)
    print(f"{len(documents)} documents, {num_errors} could not be read", file=sys.stderr)
    return EXIT_DATA if num_errors else EXIT_DONE


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m inference.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="HF_DIR", help="exported model folder")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="image, folder, annotation file")
    parser.add_argument("--boxes", action="store_true", help="read each annotated box by itself")
    parser.add_argument("--template", metavar="NAME", help="default: the one it was trained with")
    parser.add_argument("--out", metavar="FILE", help="default: stdout")
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH_SIZE)
    parser.add_argument("--max-new-tokens", type=int, help="limit of each answer")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    options = parser.parse_args(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size {options.batch_size}: must be at least 1")
    return options


if __name__ == "__main__":
    run_command(main)
