"""Index WebDataset shards: where every sample lies, and which samples cannot be used.

    python -m data_tools.index 'shards/train-*.tar'
    python -m data_tools.index 's3://bucket/train-{000000..000127}.tar' --workers 32
    python -m data_tools.index https://host/data.tar --index-dir indexes --checksums

Any plain WebDataset tar will do: those of `data_tools.build`, and images beside a KEY.txt or a
KEY.json with a text (docs/data.md). Each index lies beside its shard, or in --index-dir. Typed
again, the command indexes what is new and what was replaced. What it finds wrong is counted here;
`python -m data_tools.check` looks into every sample.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from data_tools.errors import run_command
from data_tools.jobs import num_usable_cores
from data_tools.stream.index import expand, index_shards, open_index
from data_tools.stream.shard_index import ShardIndex


@dataclass
class Problem:
    """A reason why samples cannot be used: how many, and the first one."""

    count: int
    first: str


@dataclass
class Summary:
    """What shards hold.

    Attributes:
        shards: how many there are.
        indexed: of them, those that were indexed now.
        samples: in all shards, usable or not.
        usable: samples without a reason.
        images: of usable samples.
        bytes: of all samples, tar headers included.
        reasons: general words -> the samples that cannot be used for it.
        damaged: shard -> what is wrong with the tar itself.
    """

    shards: int = 0
    indexed: int = 0
    samples: int = 0
    usable: int = 0
    images: int = 0
    bytes: int = 0
    reasons: dict[str, Problem] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    def add(self, index: ShardIndex) -> None:
        """Count a shard."""
        self.shards += 1
        self.samples += len(index)
        self.usable += len(index) - len(index.reasons)
        self.images += len(index.image_wh)
        self.bytes += int(index.size.sum(dtype="uint64"))
        if index.damage:
            self.damaged[index.path] = index.damage
        for row, reason in index.reasons.items():
            words = reason.split(": ", 1)[0]
            first = f'{index.path}, sample "{index.keys[row]}": {reason}'
            self.reasons.setdefault(words, Problem(0, first)).count += 1

    def __str__(self) -> str:
        """Return the summary for people."""
        lines = [
            f"shards   {self.shards} ({self.indexed} indexed now)",
            f"samples  {self.samples} ({self.usable} usable)",
            f"images   {self.images}",
            f"bytes    {self.bytes} ({self.bytes / 1e9:.2f} GB)",
        ]
        for words, problem in sorted(self.reasons.items(), key=lambda item: -item[1].count):
            lines.append(f"not usable, {words}: {problem.count}\n  first: {problem.first}")
        for shard, damage in self.damaged.items():
            lines.append(f"damaged  {shard}: {damage}; the samples before it are kept")
        return "\n".join(lines)


def summarize(
    patterns: Sequence[str],
    *,
    workers: int,
    index_dir: str | None = None,
    checksums: bool = False,
) -> Summary:
    """Index what is missing and count what all shards hold.

    Raises:
        DataError: if no shard matches, or some cannot be indexed.
        StorageError: if a shard cannot be read.
    """
    shards = list(dict.fromkeys(expand(list(patterns))))
    made = index_shards(
        shards, workers=workers, index_dir=index_dir, checksums=checksums, replace=True
    )
    summary = Summary(indexed=len(made))
    for shard in shards:
        summary.add(open_index(shard, index_dir))
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.index",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards", nargs="+", metavar="URL", help="paths or URLs; globs and {000000..000127} work"
    )
    parser.add_argument(
        "--workers", type=int, default=num_usable_cores(), help="processes (default: the cores)"
    )
    parser.add_argument(
        "--index-dir", metavar="DIR", help="folder for the indexes of shards that are read-only"
    )
    parser.add_argument(
        "--checksums",
        action="store_true",
        help="read all of remote shards, for a checksum of every sample; local shards have them",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_args(arguments)
    summary = summarize(
        options.shards,
        workers=options.workers,
        index_dir=options.index_dir,
        checksums=options.checksums,
    )
    print(json.dumps(asdict(summary), ensure_ascii=False) if options.json else summary)
    if summary.reasons or summary.damaged:
        print(
            "Training leaves these samples out and counts them (data.max_hole_share). All of them: "
            "python -m data_tools.check SHARDS",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    run_command(main)
