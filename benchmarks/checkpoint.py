"""Checkpoints against DeepSpeed's own: saving, loading, another world size, export.

    python -m benchmarks.checkpoint                 # 252 M parameters, 2 ranks; 20 GB of disk
    python -m benchmarks.checkpoint --layers 3 --rounds 2 --json

Both sides save the same state of one engine, interleaved in one process a rank, and load it into
fresh processes; the loaded states must be equal (exit code 1 if not). Times are medians of the
slowest rank, ratios are ours over theirs. What bounds it: the disk and its fsync for bytes, memory
bandwidth for what training waits for. Ours fsyncs and checksums every byte, theirs does neither.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.checkpointing.ranks import WIDTH
from data_tools.errors import EXIT_DEFECT, LecternError, run_command

MIB = 2**20
PAGE_BYTES = 4096
WATCH_S = 0.004
WORLD = 2


class BenchmarkError(LecternError):
    """A part of the benchmark failed."""

    exit_code = EXIT_DEFECT


def run_scenario(
    name: str, folder: Path, world: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Run a scenario of `benchmarks.checkpointing.ranks` on some ranks; return its result."""
    command = [sys.executable, "-m", "benchmarks.checkpointing.ranks", name, str(folder)]
    command += ["--world", str(world), "--layers", str(options.layers)]
    command += ["--rounds", str(options.rounds), "--steps", str(options.steps)]
    command += ["--store", str(folder / f"store-{uuid.uuid4().hex}")]
    logs = [(folder / f"{name}-{rank}.log").open("w") for rank in range(world)]
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=logs[rank], stderr=logs[rank])
        for rank in range(world)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        text = (folder / f"{name}-{codes.index(max(codes))}.log").read_text(encoding="utf-8")
        raise BenchmarkError(f"{name}: a rank ended with {codes}\n{text[-3000:]}")
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return result


def compare_loads(
    kinds: tuple[str, str], folder: Path, world: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Load in two ways, interleaved, each time in fresh processes; compare the states."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    states = set()
    for _ in range(options.rounds):
        for kind in kinds:
            found = run_scenario(kind, folder, world, options)
            seconds[kind].append(found["seconds"])
            states.add(tuple(found["digests"]))
    ours, theirs = (statistics.median(seconds[kind]) for kind in kinds)
    return {"ours": ours, "theirs": theirs, "is_equal": len(states) == 1, "rounds": seconds}


def watch_converter(kind: str, folder: Path, out: Path) -> tuple[float, float]:
    """Return (seconds, peak anonymous MiB above the idle process) of a converter."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.checkpointing.converters", kind]
    with (folder / f"{kind}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(folder), str(out)], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        while (line := process.stdout.readline()) and line.strip() != "ready":
            continue
        idle = peak = _anonymous_bytes(process.pid)
        while process.poll() is None:
            peak = max(peak, _anonymous_bytes(process.pid))
            time.sleep(WATCH_S)
        found = re.search(r"seconds ([\d.]+)", process.stdout.read())
    if process.returncode or found is None:
        text = (folder / f"{kind}.log").read_text(encoding="utf-8")
        raise BenchmarkError(f"converter {kind} failed\n{text[-3000:]}")
    return float(found[1]), (peak - idle) / MIB


def _anonymous_bytes(pid: int) -> int:
    """Return resident memory that no file backs (Linux)."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return 0
    return (int(resident) - int(shared)) * PAGE_BYTES


def same_weights(ours: Path, theirs: Path) -> bool:
    """Tell whether two folders of safetensors hold the same tensors, whatever their prefix."""

    def tensors(folder: Path) -> dict[str, Any]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    found[name.removeprefix("model.")] = file.get_tensor(name)
        return found

    one, two = tensors(ours), tensors(theirs)
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def size_of(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run every part; return what was found."""
    found: dict[str, Any] = {"save": run_scenario("save", folder, WORLD, options)}
    found["bytes"] = [
        size_of(folder / "ours" / "step-00000001"),
        size_of(folder / "theirs" / "step"),
    ]
    found["load"] = compare_loads(("ours", "theirs"), folder, WORLD, options)
    exports: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for _ in range(options.rounds):
        for kind, results in exports.items():
            results.append(watch_converter(kind, folder, folder / f"export-{kind}"))
    found["is_equal"] = found["load"]["is_equal"] and same_weights(
        folder / "export-ours", folder / "export-theirs"
    )
    found["export"] = {
        kind: [statistics.median(values) for values in zip(*results, strict=True)]
        for kind, results in exports.items()
    }
    start = time.perf_counter()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / "theirs" / "step")]
    done = subprocess.run(
        [*command, "--output_folder", str(folder / "universal")],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"ds_to_universal failed\n{done.stderr[-3000:]}")
    found["conversion_s"] = time.perf_counter() - start
    found["conversion_bytes"] = size_of(folder / "universal")
    found["elastic"] = compare_loads(("ours", "universal"), folder, 1, options)
    found["is_equal"] &= found["elastic"]["is_equal"]
    return found


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return ours over theirs, and the anonymous memory of our export in MB."""
    save, load, export = found["save"], found["load"], found["export"]
    ours, theirs = (save[name] - save["plain"] for name in ("ours", "theirs"))
    return {
        "blocked": save["ours_blocked"] / save["theirs_blocked"],
        "extra_wall": ours / theirs,
        "bytes": found["bytes"][0] / found["bytes"][1],
        "export_time": export["ours"][0] / export["theirs"][0],
        "load": load["ours"] / load["theirs"],
        "elastic_load": found["elastic"]["ours"]
        / (found["conversion_s"] + found["elastic"]["theirs"]),
        "export_anon_mb": export["ours"][1] * MIB / 1e6,
    }


def print_table(found: dict[str, Any], values: dict[str, float]) -> None:
    """Print what was measured for people."""
    save, load, export, elastic = (found[n] for n in ("save", "load", "export", "elastic"))
    ours, theirs = (save[name] - save["plain"] for name in ("ours", "theirs"))
    rows = [
        ("training waits for a save, s", save["ours_blocked"], save["theirs_blocked"], "blocked"),
        ("extra wall of the steps with it, s", ours, theirs, "extra_wall"),
        ("bytes, MB", *(size / 1e6 for size in found["bytes"]), "bytes"),
        ("load, same world size, s", load["ours"], load["theirs"], "load"),
        (
            "load, 2 -> 1 ranks, s",
            elastic["ours"],
            found["conversion_s"] + elastic["theirs"],
            "elastic_load",
        ),
        ("export to fp32 files, s", export["ours"][0], export["theirs"][0], "export_time"),
    ]
    print(f"{'':38}{'ours':>10}{'DeepSpeed':>12}{'ratio':>8}")
    for name, one, two, key in rows:
        print(f"{name:38}{one:10.2f}{two:12.2f}{values[key]:8.2f}")
    one, two = export["ours"][1], export["theirs"][1]
    print(f"{'anonymous memory of the export, MiB':38}{one:10.0f}{two:12.0f}{one / two:8.2f}")
    extra = found["conversion_bytes"] / 1e6
    print(f"second copy on disk for 2 -> 1, MB             0{extra:12.0f}")


def main() -> int:
    """Measure and print; 1 if the two do not agree on the state."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=15, help="of 16.8 M parameters each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="with a save in them")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as name:
        found = measure(Path(name), options)
    values = ratios(found)
    if options.json:
        print(json.dumps(values | {"found": found}))
    else:
        count = options.layers * WIDTH * (WIDTH + 1) / 1e6
        print(f"{count:.0f} M parameters, fp32, {WORLD} ranks; medians of {options.rounds} rounds")
        print_table(found, values)
    return 0 if found["is_equal"] else 1


if __name__ == "__main__":
    run_command(main)
