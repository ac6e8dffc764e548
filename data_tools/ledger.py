"""Prove what a run saw: which samples in which step, how often in which epoch, what was left out.

    python -m data_tools.ledger RUN/stage1
    python -m data_tools.ledger RUN/stage1 --steps 120:125      the samples of six steps
    python -m data_tools.ledger RUN/stage1 --key INVOICE-0042   where one document was seen
    python -m data_tools.ledger RUN/stage1 --out seen.jsonl     every step, one a line

The plan is made again from the run's own files (plan.json, data/*.catalogue) and compared with the
hashes in data.jsonl; samples that could not be read are those of faults.jsonl. Neither shards nor
model are needed. Ends with 0 if every completed epoch saw every sample exactly once, up to the
holes that are named, and with 65 otherwise.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.errors import EXIT_DATA, EXIT_DONE, ConfigError, run_command
from data_tools.output import text_file_or_none
from data_tools.stream.source import Source
from data_tools.views.replay import EpochCount, Replay, SampleCounter, SeenStep

MAX_HOLES_SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = parse_arguments(arguments)
    replay = Replay(options.run)
    counter = SampleCounter(replay.sources)
    chosen: list[dict[str, Any]] = []
    visits: list[dict[str, Any]] = []
    with text_file_or_none(options.out) as out:
        for seen in _with_progress(replay):
            counter.add(seen)
            is_chosen = options.steps is not None and seen.number in options.steps
            if is_chosen or out is not None:
                record = step_record(seen, replay.sources)
                if is_chosen:
                    chosen.append(record)
                if out is not None and (options.steps is None or is_chosen):
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
            if options.key is not None:
                visits += find_key(seen, replay.sources, options.key)
    epochs = counter.epochs(replay.planner)
    is_exact = not replay.problems and all(epoch.is_exact for epoch in epochs)
    report = to_json(replay, epochs, is_exact)
    if options.json:
        extra = {"seen": chosen} if options.steps is not None else {}
        extra |= {"visits": visits} if options.key is not None else {}
        print(json.dumps(report | extra, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_describe(report, chosen, visits, options.key)))
    return EXIT_DONE if is_exact else EXIT_DATA


def step_record(seen: SeenStep, sources: list[Source]) -> dict[str, Any]:
    """Return what a step saw: its packs, each a list of samples; holes carry their reason."""
    reasons = {(hole["source"], hole["key"]): hole["reason"] for hole in seen.holes}
    packs = []
    for pack in seen.plan.packs:
        samples = []
        for planned in pack:
            source, key = planned.source, sources[planned.source].key(planned.sample_id)
            template = sources[source].recipe.templates[planned.template].name
            sample = {"source": source, "key": key, "epoch": planned.epoch, "template": template}
            if planned.windows > 1:
                sample |= {"window": planned.window, "windows": planned.windows}
            if (source, key) in reasons:
                sample["hole"] = reasons[source, key]
            samples.append(sample)
        packs.append(samples)
    return {"step": seen.number, "plan_hash": seen.plan.plan_hash, "packs": packs}


def find_key(seen: SeenStep, sources: list[Source], key: str) -> list[dict[str, Any]]:
    """Return where a step saw the sample of a name."""
    record = step_record(seen, sources)
    return [
        {"step": seen.number, "pack": number} | sample
        for number, pack in enumerate(record["packs"])
        for sample in pack
        if sample["key"] == key
    ]


def to_json(replay: Replay, epochs: list[EpochCount], is_exact: bool) -> dict[str, Any]:
    """Return the ledger without the single steps."""
    sources = []
    for number, source in enumerate(replay.sources):
        own = [vars(epoch) for epoch in epochs if epoch.source == number]
        sources.append(
            {
                "source": number,
                "shards": len(source.shards),
                "samples": source.num_samples,
                "used": len(source),
                "left_out": {
                    why: {"samples": count, "first": first}
                    for why, (count, first) in source.left_out.items()
                },
                "epochs": own,
            }
        )
    holes = [hole for step in sorted(replay.holes) for hole in replay.holes[step]]
    return {
        "run": str(replay.folder),
        "steps_recorded": len(replay.records),
        "steps_confirmed": replay.num_steps,
        "last_line_is_torn": replay.is_torn,
        "problems": replay.problems,
        "sources": sources,
        "holes": holes,
        "is_exact": is_exact,
    }


def _describe(
    report: dict[str, Any], chosen: list[dict], visits: list[dict], key: str | None
) -> Iterator[str]:
    """Yield the lines for people."""
    for record in chosen:
        yield from _describe_step(record)
    if key is not None:
        yield f"{key}: seen {len(visits)} times" if visits else f"{key}: not seen by any step"
        for visit in visits:
            yield f"  step {visit['step']}, pack {visit['pack']}: {_sample_words(visit)}"
    confirmed, recorded = report["steps_confirmed"], report["steps_recorded"]
    yield f"{report['run']}: {confirmed} of {recorded} steps planned again, with the same hashes"
    if report["last_line_is_torn"]:
        yield "  the last line of data.jsonl is cut off: the run was killed, or is writing it"
    for source in report["sources"]:
        yield (
            f"source {source['source']}: {source['used']} of {source['samples']} samples used, "
            f"{source['shards']} shards"
        )
        for why, entry in source["left_out"].items():
            yield f"  left out, {why}: {entry['samples']} (first: {entry['first']})"
        for epoch in source["epochs"]:
            yield f"  epoch {epoch['epoch']}: {_epoch_words(epoch)}"
    yield from _describe_holes(report["holes"])
    for problem in report["problems"]:
        yield f"PROBLEM: {problem}"
    yield _verdict(report)


def _describe_step(record: dict[str, Any]) -> Iterator[str]:
    yield f"step {record['step']}, plan {record['plan_hash']}"
    for number, pack in enumerate(record["packs"]):
        yield f"  pack {number}"
        for sample in pack:
            yield f"    {sample['key']}: {_sample_words(sample)}"


def _sample_words(sample: dict[str, Any]) -> str:
    words = f"source {sample['source']}, epoch {sample['epoch']}, {sample['template']}"
    if "windows" in sample:
        words += f", part {sample['window'] + 1} of {sample['windows']}"
    return words + (f", HOLE: {sample['hole']}" if "hole" in sample else "")


def _epoch_words(epoch: dict[str, Any]) -> str:
    words = f"{epoch['num_once']} of {epoch['size']} samples once"
    if epoch["num_holes"]:
        words += f" ({epoch['num_holes']} of them holes)"
    if epoch["num_repeated"]:
        words += f", {epoch['num_repeated']} MORE THAN ONCE ({', '.join(epoch['repeated'])} ...)"
    if not epoch["is_complete"]:
        return f"{words}, not complete yet"
    if epoch["num_never"]:
        words += f", {epoch['num_never']} NEVER ({', '.join(epoch['never'])} ...)"
    return words


def _describe_holes(holes: list[dict[str, Any]]) -> Iterator[str]:
    if holes:
        yield f"holes, samples that were planned but could not be used: {len(holes)}"
    for hole in holes[:MAX_HOLES_SHOWN]:
        yield f"  step {hole['step']}, {hole['key']}: {hole['reason']}"
    if len(holes) > MAX_HOLES_SHOWN:
        yield f"  and {len(holes) - MAX_HOLES_SHOWN} more, see faults.jsonl"


def _verdict(report: dict[str, Any]) -> str:
    if not report["is_exact"]:
        return "verdict: NOT EXACT, see above"
    epochs = [epoch for source in report["sources"] for epoch in source["epochs"]]
    num_complete = sum(epoch["is_complete"] for epoch in epochs)
    if not num_complete:
        return "verdict: exact so far, no sample was seen twice in an epoch; no epoch is complete"
    holes = f", but for {len(report['holes'])} holes named above" if report["holes"] else ""
    return (
        f"verdict: exact, every sample was seen exactly once in each of {num_complete} completed "
        f"epochs{holes}"
    )


def _with_progress(replay: Replay) -> Iterator[SeenStep]:
    total = len(replay.records)
    yield from tqdm(
        replay.steps(), total=total, desc="steps", unit="step", disable=not sys.stderr.isatty()
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: if --steps is no range of steps.
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.ledger",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN/stageN", type=Path, help="folder of a stage")
    parser.add_argument("--steps", metavar="A:B", help="print the samples of these steps")
    parser.add_argument("--key", help="print where this sample was seen")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write steps as JSON lines")
    parser.add_argument("--json", action="store_true", help="print a JSON record")
    options = parser.parse_args(arguments)
    options.steps = None if options.steps is None else parse_steps(options.steps)
    return options


def parse_steps(text: str) -> range:
    """Return the steps of `A:B`, both included, or of `A` alone.

    Raises:
        ConfigError: if it is neither.
    """
    first, colon, last = text.partition(":")
    last = last if colon else first
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--steps {text}: expected two step numbers from 1 on, as 120:125")
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    run_command(main)
