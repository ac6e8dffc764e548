"""Measure how well an exported model reads shards: CER, WER, fields, lines, with intervals.

    python -m inference.evaluate RUN/stage2/hf SHARDS/val-*.tar
    python -m inference.evaluate RUN/stage2/hf SHARDS/val-*.tar --num 500 --seed 1 --device cpu
    python -m inference.evaluate HF_DIR 's3://bucket/val-*.tar' --out RUN/stage2/report
    python -m inference.evaluate HF_DIR SHARDS/val-*.tar --template receipt-fields-en

Prints a table; --out writes report.json, report.md and predictions.jsonl. Greedy decoding: the same
folder and shards give the same figures. Texts that the annotation calls illegible (weight 0) are
left out where a sample is one line.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from data_tools.errors import ConfigError, DataError, run_command
from data_tools.examples.images import decode
from data_tools.examples.tasks import ask
from data_tools.output import join, make_folder, write_file
from data_tools.sample import Sample
from data_tools.stream.index import ShardIndex, expand, open_index
from data_tools.templates import Template
from inference.progress import Progress
from inference.reader import DEFAULT_BATCH_SIZE, Reader, Reading, Request
from inference.report import Evaluation, markdown, table
from train.metrics import (
    FieldReport,
    LineReport,
    NormalizeOptions,
    count_errors,
    field_report,
    line_report,
    text_report,
)

BATCHES_AHEAD = 8  # samples sorted by length together, so that batches are even


@dataclass(frozen=True)
class Scored:
    """A sample, what it says and what was read."""

    sample: Sample
    reference: str
    reading: Reading

    @property
    def group(self) -> str:
        """What is resampled for intervals: the document that a line is from, or the sample."""
        return str(self.sample.tags.get("document", self.sample.key))


@dataclass
class _Collected:
    scored: list[Scored] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def run(
    reader: Reader,
    patterns: Sequence[str],
    *,
    template: str | None = None,
    num: int | None = None,
    seed: int = 0,
    options: NormalizeOptions | None = None,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> tuple[Evaluation, list[Scored]]:
    """Read samples and compare.

    Args:
        reader: of the model.
        patterns: paths, URLs or globs of shards.
        template: name or path; None: the model's own. A sample that is a conversation asks its
            own first question.
        num: draw this many samples; None: all.
        seed: of the draw and of the bootstrap.
        options: normalisation before comparison.
        max_new_tokens: limit of each answer.
        on_batch: called with the number of samples of each batch that is read.

    Raises:
        ConfigError: if a line reader is given shards of pages.
        DataError: if no sample can be compared.
    """
    options = options or NormalizeOptions()
    asked = reader.template(template)
    start = time.perf_counter()
    collected = _Collected()
    samples = _read(draw_rows(patterns, num, seed))
    while chunk := list(islice(samples, BATCHES_AHEAD * reader.batch_size)):
        _read_chunk(reader, chunk, template, max_new_tokens, on_batch, collected)
    if not collected.scored:
        reasons = "; ".join(f"{n} x {why}" for why, n in collected.left_out.most_common(3))
        raise DataError(
            f"{', '.join(patterns)}: no sample to compare for template {asked.name} "
            f"({reasons or 'the shards are empty'})"
        )
    seconds = time.perf_counter() - start
    return _evaluation(reader, asked, patterns, collected, options, seed, seconds), collected.scored


def draw_rows(patterns: Sequence[str], num: int | None, seed: int) -> list[tuple[ShardIndex, int]]:
    """Return (index, row) of the samples to read, in the order of the shards.

    Those that the index knows to be unusable are passed over.
    """
    indexes = [open_index(shard) for shard in expand(list(patterns))]
    rows = [
        (index, row) for index in indexes for row in range(len(index)) if row not in index.reasons
    ]
    if num is None or num >= len(rows):
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), size=num, replace=False)
    return [rows[number] for number in sorted(chosen)]


def _read(rows: list[tuple[ShardIndex, int]]) -> Iterator[Sample]:
    return (index.read(row) for index, row in rows)


def _read_chunk(
    reader: Reader,
    chunk: list[Sample],
    template: str | None,
    max_new_tokens: int | None,
    on_batch: Callable[[int], object] | None,
    collected: _Collected,
) -> None:
    ready: list[tuple[Sample, str, Request]] = []
    for sample in chunk:
        if reader.unit == "line" and _num_lines(sample) > 1:
            raise ConfigError(
                f'this model reads lines, and sample "{sample.key}" is a page with '
                f"{_num_lines(sample)} boxes; build the shards with "
                "`python -m data_tools.build SRC OUT --unit line`"
            )
        if reader.unit == "line" and sample.annotations and not _is_legible(sample):
            collected.left_out["illegible"] += 1
            continue
        try:
            ready.append((sample, *_prepare(reader, sample, template)))
        except DataError as error:
            collected.left_out[str(error).split(": ", 1)[-1]] += 1
    requests = [request for _, _, request in ready]
    answers = reader.answer(requests, max_new_tokens, on_batch)
    for (sample, reference, _), readings in zip(ready, answers, strict=True):
        collected.scored.append(Scored(sample, reference, readings[0]))


def _prepare(reader: Reader, sample: Sample, template: str | None) -> tuple[str, Request]:
    """Return the right answer (for `lines` its texts alone) and the request for a sample."""
    asked = reader.template(template)
    turns = ask(sample, asked)
    answer = next(number for number, turn in enumerate(turns) if turn.role == "assistant")
    question = next(turn.text for turn in turns[:answer] if turn.role == "user")
    reference = turns[answer].text
    if sample.messages is None and asked.task == "lines":
        reference = "\n".join(a.text for a in sample.annotations if a.bbox is not None)
    pages = [
        decode(data, page.file)
        for data, page in zip(sample.image_bytes, sample.images, strict=True)
    ]
    return reference, reader.prepare(pages, template=template, question=question)


def _evaluation(
    reader: Reader,
    template: Template,
    patterns: Sequence[str],
    collected: _Collected,
    options: NormalizeOptions,
    seed: int,
    seconds: float,
) -> Evaluation:
    scored = collected.scored
    groups = [item.group for item in scored]
    return Evaluation(
        shards=tuple(patterns),
        template=template.name,
        unit=reader.unit,
        num_samples=len(scored),
        num_unfinished=sum(not item.reading.finished for item in scored),
        left_out=dict(collected.left_out),
        seconds=seconds,
        text=text_report(
            [item.reference for item in scored],
            [item.reading.text for item in scored],
            groups=groups,
            options=options,
            seed=seed,
        ),
        fields=_field_scores(template, scored, options, seed),
        lines=_line_scores(template, scored, options, seed),
    )


def _field_scores(
    template: Template, scored: list[Scored], options: NormalizeOptions, seed: int
) -> FieldReport | None:
    items = [item for item in scored if item.sample.messages is None]
    if template.task != "fields" or not items:
        return None
    keys = [field.key for field in template.fields]
    return field_report(
        [{key: item.sample.fields.get(key) for key in keys} for item in items],
        [item.reading.fields for item in items],
        groups=[item.group for item in items],
        options=options,
        seed=seed,
    )


def _line_scores(
    template: Template, scored: list[Scored], options: NormalizeOptions, seed: int
) -> LineReport | None:
    """Return the scores of boxed lines; documents of several pages have none."""
    items = [item for item in scored if item.reading.lines is not None]
    if template.task != "lines" or not items:
        return None
    return line_report(
        [[(a.bbox, a.text) for a in i.sample.annotations if a.bbox is not None] for i in items],
        [[(line.bbox, line.text) for line in i.reading.lines or ()] for i in items],
        groups=[item.group for item in items],
        options=options,
        seed=seed,
    )


def _num_lines(sample: Sample) -> int:
    return sum(annotation.bbox is not None for annotation in sample.annotations)


def _is_legible(sample: Sample) -> bool:
    return any(annotation.weight > 0 for annotation in sample.annotations)


def prediction_record(item: Scored, options: NormalizeOptions) -> dict[str, Any]:
    """Return the line of predictions.jsonl for a sample."""
    counts = count_errors(item.reference, item.reading.text, options)
    record: dict[str, Any] = {
        "key": item.sample.key,
        "group": item.group,
        "reference": item.reference,
        "text": item.reading.text,
        "errors": counts.character_errors,
        "characters": counts.characters,
        "finished": item.reading.finished,
    }
    if item.reading.fields is not None:
        record["fields"] = item.reading.fields
    if item.reading.lines is not None:
        record["lines"] = [
            {"bbox": list(line.bbox), "text": line.text} for line in item.reading.lines
        ]
    return record


def write_report(
    out: str, evaluation: Evaluation, scored: Sequence[Scored], options: NormalizeOptions
) -> None:
    """Write report.json, report.md and predictions.jsonl into a folder or URL."""
    make_folder(out)
    records = [prediction_record(item, options) for item in scored]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file(join(out, "predictions.jsonl"), lines.encode("utf-8"))
    write_file(join(out, "report.md"), markdown(evaluation).encode("utf-8"))
    write_file(join(out, "report.json"), _json(evaluation))


def _json(evaluation: Evaluation) -> bytes:
    text = json.dumps(dataclasses.asdict(evaluation), ensure_ascii=False, indent=2)
    return (text + "\n").encode("utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parse(arguments)
    reader = Reader.load(options.model, device=options.device, batch_size=options.batch_size)
    total = len(draw_rows(options.shards, options.num, options.seed))
    normalize = NormalizeOptions(options.casefold, options.no_punct, options.fold_width)
    with Progress(total, "sample") as progress:
        evaluation, scored = run(
            reader,
            options.shards,
            template=options.template,
            num=options.num,
            seed=options.seed,
            options=normalize,
            max_new_tokens=options.max_new_tokens,
            on_batch=progress.update,
        )
    print(table(evaluation), end="")
    if options.json:
        write_file(options.json, _json(evaluation))
    if options.out:
        write_report(options.out, evaluation, scored, normalize)
        print(f"written to {options.out}", file=sys.stderr)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m inference.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="HF_DIR", help="exported model folder")
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="paths, URLs or globs")
    parser.add_argument("--template", metavar="NAME", help="default: the one it was trained with")
    parser.add_argument("--num", type=int, metavar="N", help="draw so many samples; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the intervals")
    parser.add_argument("--out", metavar="REPORT_DIR", help="folder or URL for the reports")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--casefold", action="store_true", help="ignore case")
    parser.add_argument("--no-punct", action="store_true", help="ignore punctuation")
    parser.add_argument("--fold-width", action="store_true", help="full-width equals half-width")
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH_SIZE)
    parser.add_argument("--max-new-tokens", type=int, help="limit of each answer")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or (options.num is not None and options.num < 1):
        raise ConfigError("--batch-size and --num must be at least 1")
    return options


if __name__ == "__main__":
    run_command(main)
