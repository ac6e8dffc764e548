"""Check every sample of some shards, before a run meets what is wrong with them.

    python -m data_tools.check SHARDS
    python -m data_tools.check 'shards/train-{000000..000099}.tar' --workers 32 --report bad.jsonl
    python -m data_tools.check s3://bucket/train-*.tar --json
    python -m data_tools.check SHARDS --sample 64                # seconds, whatever their number

SHARDS are paths, URLs, globs or braces. Of each sample: the bytes are those that were indexed, its
JSON is valid, every image decodes and has the size of its record, boxes lie on their pages, there
is text, and no two samples share a key. All problems go into --report as JSON lines; by kind, with
the first key of each, they are told at the end. Ends with 0 if there are none, else with 65. With
--sample, N samples that are spread over all shards are read, the same ones each time; shards
without an index are looked at from their beginning, and repeated keys are not searched for.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data_tools.errors import EXIT_DATA, EXIT_DONE, ConfigError, DataError, run_command
from data_tools.jobs import num_usable_cores, run_jobs
from data_tools.output import text_file_or_none
from data_tools.stream.index import (
    ShardIndex,
    expand,
    index_shards,
    open_beginning,
    open_index,
)
from data_tools.views.problems import (
    KINDS,
    CheckJob,
    CheckResult,
    Problem,
    check_rows,
    check_samples,
)

ROWS_PER_JOB = 200
SHARDS_AT_A_TIME = 16
GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, spread evenly however many there are


@dataclass
class Summary:
    """What a check found, in numbers.

    Attributes:
        num_shards: looked at.
        num_samples: of them.
        num_images: of them.
        counts: problems by kind.
        first: kind -> the first problem of it, in the order of the shards.
        bad_samples: (shard, key) of samples with a problem; key "" for the shard itself.
    """

    num_shards: int = 0
    num_samples: int = 0
    num_images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, Problem] = field(default_factory=dict)
    bad_samples: set[tuple[str, str]] = field(default_factory=set)

    def add(self, problem: Problem) -> None:
        """Take in a problem."""
        self.counts[problem.kind] += 1
        self.bad_samples.add((problem.shard, problem.key))
        known = self.first.setdefault(problem.kind, problem)
        if (problem.shard, problem.key) < (known.shard, known.key):
            self.first[problem.kind] = problem

    def take(self, result: CheckResult) -> None:
        """Take in what a look at some samples found."""
        self.num_samples += result.num_samples
        self.num_images += result.num_images
        for problem in result.problems:
            self.add(problem)

    def to_json(self) -> dict[str, Any]:
        """Return the record that `--json` prints."""
        return {
            "shards": self.num_shards,
            "samples": self.num_samples,
            "images": self.num_images,
            "problems": sum(self.counts.values()),
            "bad_samples": len(self.bad_samples),
            "by_kind": {
                kind: {"count": self.counts[kind], "first": asdict(self.first[kind])}
                for kind in KINDS
                if self.counts[kind]
            },
            "is_clean": not self.counts,
        }

    def __str__(self) -> str:
        """Return the summary for people."""
        lines = [f"{self.num_samples} samples, {self.num_images} images, {self.num_shards} shards"]
        for kind in KINDS:
            if self.counts[kind]:
                first = self.first[kind]
                lines.append(f"{self.counts[kind]:>6} x {kind}: {KINDS[kind]}")
                lines.append(f"         first: {first.shard}, {first.key or 'the shard itself'}")
                lines.append(f"                {first.problem}")
        if not self.counts:
            return "\n".join([*lines, "no problem found"])
        return "\n".join([*lines, f"{len(self.bad_samples)} samples or shards have a problem"])


def check(
    shards: Sequence[str],
    workers: int,
    report: TextIO | None = None,
    index_dir: str | None = None,
) -> Summary:
    """Check all samples of some shards.

    Args:
        shards: paths or URLs.
        workers: processes.
        report: gets every problem as a JSON line, as they are found.
        index_dir: where the indexes lie, if not beside the shards.
    """
    summary = Summary(num_shards=len(shards))

    def tell(problem: Problem) -> None:
        summary.add(problem)
        if report is not None:
            report.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")

    try:
        index_shards(shards, workers=workers, index_dir=index_dir)
    except DataError:
        print("some shards cannot be indexed, see below", file=sys.stderr)
    jobs: list[CheckJob] = []
    indexes: list[ShardIndex] = []
    for shard in shards:
        try:
            index = open_index(shard, index_dir)
        except DataError as error:
            tell(Problem(shard, "", "shard", str(error)))
            continue
        if index.damage:
            tell(Problem(shard, "", "shard", index.damage))
        indexes.append(index)
        jobs += [
            CheckJob(shard, first, min(first + ROWS_PER_JOB, len(index)), index_dir)
            for first in range(0, len(index), ROWS_PER_JOB)
        ]
    for problem in find_duplicates(indexes):
        tell(problem)
    for result in run_jobs(check_rows, jobs, workers, "check"):
        summary.num_samples += result.num_samples
        summary.num_images += result.num_images
        for problem in result.problems:
            tell(problem)
    return summary


def check_sample(shards: Sequence[str], num: int, index_dir: str | None = None) -> Summary:
    """Check some samples that are spread over all shards.

    Args:
        shards: paths or URLs.
        num: samples to read; fewer where there are fewer.
        index_dir: where the indexes lie, if not beside the shards.
    """
    counts = spread(len(shards), num)
    summary = Summary(num_shards=len(counts))

    def look(number: int) -> CheckResult:
        shard = shards[number]
        try:
            index = open_beginning(shard, counts[number], index_dir)
        except DataError as error:
            return CheckResult(0, 0, (Problem(shard, "", "shard", str(error)),))
        result = check_samples(index, rows_of_sample(len(index), counts[number], number))
        damage = (Problem(shard, "", "shard", index.damage),) if index.damage else ()
        return CheckResult(result.num_samples, result.num_images, damage + result.problems)

    with ThreadPoolExecutor(SHARDS_AT_A_TIME) as threads:
        for result in threads.map(look, counts):
            summary.take(result)
    return summary


def spread(num_shards: int, num: int) -> dict[int, int]:
    """Return, by number of a shard, how many of `num` samples are taken from it."""
    if num >= num_shards:
        return Counter(sample * num_shards // num for sample in range(num if num_shards else 0))
    # The first and the last shard are among them: the last one is where a copy breaks off.
    return Counter(round(sample * (num_shards - 1) / max(1, num - 1)) for sample in range(num))


def rows_of_sample(num_rows: int, num: int, shard: int) -> list[int]:
    """Return `num` different rows at equal distances; where they begin changes with the shard."""
    phase = shard * GOLDEN_RATIO % 1
    num = min(num, num_rows)
    return [int((place + phase) * num_rows / num) for place in range(num)]


def find_duplicates(indexes: Sequence[ShardIndex]) -> Iterator[Problem]:
    """Yield every sample whose key an earlier sample has, in the order of shards and rows."""
    if not indexes:
        return
    starts = np.cumsum([0, *(len(index) for index in indexes)])
    # Hashes instead of the keys themselves: 8 bytes a sample. They only point at candidates.
    hashes = np.concatenate(
        [np.fromiter(map(hash, index.keys), np.int64, len(index)) for index in indexes]
    )
    order = np.argsort(hashes, kind="stable")
    is_repeated = hashes[order][1:] == hashes[order][:-1]
    owners: dict[str, str] = {}
    rows = np.union1d(order[:-1][is_repeated], order[1:][is_repeated])
    for row in rows.tolist():
        number = int(np.searchsorted(starts, row, side="right")) - 1
        key, shard = indexes[number].keys[row - int(starts[number])], indexes[number].path
        if key in owners:
            yield Problem(shard, key, "key", f"{owners[key]} has a sample of the same key")
        owners.setdefault(key, shard)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse_arguments(arguments)
    shards = expand(options.shards)
    if options.sample is not None:
        summary = check_sample(shards, options.sample, options.index_dir)
    else:
        with text_file_or_none(options.report) as report:
            summary = check(shards, options.workers, report, options.index_dir)
    print(json.dumps(summary.to_json(), indent=2, ensure_ascii=False) if options.json else summary)
    if options.report is not None and summary.counts:
        print(f"all problems: {options.report}", file=sys.stderr)
    return EXIT_DATA if summary.counts else EXIT_DONE


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: if a number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="paths, URLs, globs, braces")
    parser.add_argument("--workers", type=int, default=num_usable_cores())
    parser.add_argument("--sample", type=int, metavar="N", help="check N samples, over all shards")
    parser.add_argument("--index-dir", metavar="DIR", help="of indexes not beside the shards")
    parser.add_argument("--report", type=Path, metavar="FILE", help="all problems as JSON lines")
    parser.add_argument("--json", action="store_true", help="print a JSON record")
    options = parser.parse_args(arguments)
    if options.workers < 1 or (options.sample is not None and options.sample < 1):
        raise ConfigError("--workers and --sample must be at least 1")
    if options.sample is not None and options.report is not None:
        raise ConfigError("--report holds all problems: leave --sample away")
    return options


if __name__ == "__main__":
    run_command(main)
