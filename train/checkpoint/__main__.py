"""Look after the checkpoints of a stage.

    python -m train.checkpoint ls RUN/stage2              # steps, sizes, when, which are best, kept
    python -m train.checkpoint verify RUN/stage2          # read every byte; --step N for one
    python -m train.checkpoint rm RUN/stage2 --step 1200  # the newest whole one stays
    python -m train.checkpoint fetch s3://bucket/run/stage2 RUN/stage2   # from a mirror

Exit codes: 0 done; 2 something is damaged, missing or must stay.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.errors import EXIT_DONE, EXIT_USER, CheckpointError, run_command
from train.checkpoint.manifest import (
    MANIFEST_FILE,
    list_checkpoints,
    newest_valid,
    read_manifest,
    verify,
)
from train.checkpoint.mirror import Mirror
from train.checkpoint.retention import delete
from train.status import read_status


def list_steps(stage: Path) -> list[dict[str, Any]]:
    """Return what is known of every checkpoint of a stage, oldest first; no shard is read."""
    best = read_status(stage).get("best_step")
    rows = []
    for step, path in list_checkpoints(stage / "checkpoints"):
        row: dict[str, Any] = {"step": step, "is_best": step == best, "problem": ""}
        try:
            manifest = read_manifest(path)
            sizes = [(path / shard.file).stat().st_size for shard in manifest.shards]
            row |= {
                "world_size": manifest.world_size,
                "bytes": sum(sizes),
                "time": (path / MANIFEST_FILE).stat().st_mtime,
            }
            if sizes != [shard.size for shard in manifest.shards]:
                row["problem"] = "a shard is cut off"
        except FileNotFoundError as error:
            row["problem"] = f"{Path(str(error.filename)).name} is missing"
        except CheckpointError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def _print_list(stage: Path, as_json: bool) -> int:
    rows = list_steps(stage)
    if as_json:
        print(json.dumps(rows))
        return EXIT_DONE
    if not rows:
        print(f"{stage / 'checkpoints'}: no checkpoint")
    for row in rows:
        if row["problem"]:
            print(f"step {row['step']:>9}  {row['problem']}")
            continue
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["time"]))
        best = "  best" if row["is_best"] else ""
        size = f"{row['bytes'] / 1e9:.2f} GB"
        print(f"step {row['step']:>9}  {when}  {size:>10}  {row['world_size']} ranks{best}")
    return EXIT_DONE


def _verify(stage: Path, step: int | None) -> int:
    found = [(n, path) for n, path in list_checkpoints(stage / "checkpoints") if step in (None, n)]
    if not found:
        raise CheckpointError(f"{stage / 'checkpoints'}: no checkpoint{_of(step)} to verify.")
    num_bad = 0
    for number, path in tqdm(found, unit="checkpoint", disable=not sys.stderr.isatty()):
        problems = verify(path)
        num_bad += bool(problems)
        print(f"step {number}: {'; '.join(problems) or 'whole'}", flush=True)
    return EXIT_USER if num_bad else EXIT_DONE


def _remove(stage: Path, steps: list[int]) -> int:
    paths = dict(list_checkpoints(stage / "checkpoints"))
    newest = newest_valid(stage / "checkpoints")
    for step in steps:
        if step not in paths:
            raise CheckpointError(
                f"{stage / 'checkpoints'}: no checkpoint of step {step}; there are: "
                f"{', '.join(map(str, paths)) or 'none'}."
            )
        if paths[step] == newest:
            raise CheckpointError(
                f"{paths[step]} is the newest whole checkpoint, which the run goes on from; it "
                f"stays. Delete the folder {stage} if the run is not wanted any more."
            )
    for step in steps:
        delete(paths[step])
        print(f"step {step}: removed")
    return EXIT_DONE


def _fetch(url: str, stage: Path, step: int | None) -> int:
    print(f"{Mirror(url).fetch(stage / 'checkpoints', step)}: whole")
    return EXIT_DONE


def _of(step: int | None) -> str:
    return "" if step is None else f" of step {step}"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(
        prog="python -m train.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="list the checkpoints of a stage")
    ls.add_argument("stage", type=Path, help="RUN/stageN")
    ls.add_argument("--json", action="store_true")
    check = commands.add_parser("verify", help="read every byte and compare checksums")
    check.add_argument("stage", type=Path, help="RUN/stageN")
    check.add_argument("--step", type=int, help="only this one")
    remove = commands.add_parser("rm", help="remove checkpoints")
    remove.add_argument("stage", type=Path, help="RUN/stageN")
    remove.add_argument("--step", type=int, action="append", required=True, help="may be repeated")
    fetch = commands.add_parser("fetch", help="copy a checkpoint from a mirror")
    fetch.add_argument("url", help="of the stage on the mirror")
    fetch.add_argument("stage", type=Path, help="RUN/stageN")
    fetch.add_argument("--step", type=int, help="default: the newest one")
    options = parser.parse_args(arguments)
    if options.command == "ls":
        return _print_list(options.stage, options.json)
    if options.command == "verify":
        return _verify(options.stage, options.step)
    if options.command == "rm":
        return _remove(options.stage, options.step)
    return _fetch(options.url, options.stage, options.step)


if __name__ == "__main__":
    run_command(main)
