"""What a very large index costs a rank: to open, in memory, and to go on in its middle.

    python -m benchmarks.scale                       # 10 million samples, a file of about 0.8 GB
    python -m benchmarks.scale --samples 1000000 --json

Opens a catalogue of made-up samples in a fresh process and plans the first steps from several
positions, interleaved, beside `np.load` of the same number of bytes. Goals: opened in under twice
np.load, under 100 MB of private memory, a wait at any position of under 1.3 times that at the
start. What bounds it: page cache reads of the columns that the first window touches.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import run_command
from data_tools.examples.tasks import Recipe
from data_tools.stream.catalogue import CATALOGUE_VERSION
from data_tools.stream.columns import create_columns
from data_tools.stream.planner import DataState, Planner
from data_tools.stream.source import Source
from data_tools.templates import load_template

SHARD_SAMPLES = 1000
KEY_BYTES = 12
ROUNDS = 9
MIB = 2**20


def write_catalogue(path: Path, count: int) -> Path:
    """Write a catalogue of samples that no shard holds: all that planning looks at."""
    shards = count // SHARD_SAMPLES
    words = ("used", "size", "crc32", "json_start", "json_size", "visual", "image_start")
    specs: dict[str, tuple[str, tuple[int, ...]]] = {name: ("uint32", (count,)) for name in words}
    specs |= {
        "image_size": ("uint32", (count,)),
        "image_wh": ("uint32", (count, 2)),
        "offset": ("uint64", (count,)),
        "key_end": ("uint64", (count + 1,)),
        "first_image": ("int64", (count + 1,)),
        "first_row": ("int64", (shards + 1,)),
        "first_used": ("int64", (shards + 1,)),
        "status": ("uint8", (count,)),
        "kind": ("uint8", (count,)),
        "keys": ("uint8", (KEY_BYTES * count,)),
        "text": ("uint32", (1, count)),
        "targets": ("uint32", (1, count)),
        "answerable": ("bool", (1, count)),
        "fit_row": ("uint32", (0,)),
        "fit": ("uint32", (0, 1, 3)),
    }
    recipe = Recipe((load_template("text-en"),), (1.0,), seed=3)
    metadata = {
        "version": CATALOGUE_VERSION,
        "settings": "s",
        "shards": json.dumps([[f"s3://pages/{i:06d}.tar", "i", "v", ""] for i in range(shards)]),
        "generations": json.dumps([{"first_epoch": 0, "num_shards": shards, "digest": "d"}]),
        "recipe": json.dumps(recipe.to_json()),
        "left_out": "{}",
        "reasons": "{}",
        "duplicates": '[0, ""]',
    }
    with create_columns(path, specs, metadata) as columns:
        _fill(columns, count)
    return path


def _fill(columns: dict[str, np.ndarray], count: int) -> None:
    rows, draw = np.arange(count + 1), np.random.default_rng(0)
    columns["used"][:] = rows[:-1]
    columns["first_image"][:] = rows
    columns["key_end"][:] = KEY_BYTES * rows
    first = np.arange(count // SHARD_SAMPLES + 1) * SHARD_SAMPLES
    columns["first_row"][:] = columns["first_used"][:] = first
    columns["visual"][:] = draw.integers(300, 2048, count)
    columns["text"][:] = draw.integers(50, 1500, count)
    columns["answerable"][:] = True
    digits = np.char.zfill(np.arange(SHARD_SAMPLES).astype("S4"), 4)
    blob = columns["keys"].reshape(-1, SHARD_SAMPLES, KEY_BYTES)
    blob[:, :, -4:] = np.frombuffer(digits.tobytes(), np.uint8).reshape(SHARD_SAMPLES, 4)


def anonymous_mib() -> float:
    """Return the private memory of this process that no file backs, in MiB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def measure_here(path: str, positions: list[int]) -> dict[str, Any]:
    """Open a catalogue and plan from several positions, interleaved.

    Returns:
        opened_s; private_mib, added by everything; ready_s, the median of each position.
    """
    Source(path)  # imports and page cache
    before, start = anonymous_mib(), time.perf_counter()
    Source(path)
    opened_s = time.perf_counter() - start
    waits: list[list[float]] = [[] for _ in positions]
    for _ in range(ROUNDS):
        for wait, position in zip(waits, positions, strict=True):
            start = time.perf_counter()
            fresh = Source(path)
            state = DataState({}, (fresh.digest,), (position,))
            step = Planner([fresh], [3], 16384, 65536, 8, state).next_step()
            assert step is not None and len(step.packs) == 8
            wait.append(time.perf_counter() - start)
    return {
        "opened_s": opened_s,
        "private_mib": anonymous_mib() - before,
        "ready_s": [statistics.median(wait) for wait in waits],
    }


def measure(path: Path, positions: list[int]) -> dict[str, Any]:
    """Return `measure_here` of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.scale", "--measure", str(path)]
    answer = subprocess.run(
        [*command, *map(str, positions)], capture_output=True, text=True, timeout=300, check=True
    )
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def _load_s(folder: Path, num_bytes: int) -> float:
    """Return the median seconds that np.load takes for an array of some bytes."""
    np.save(folder / "same.npy", np.zeros(num_bytes, np.uint8))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        np.load(folder / "same.npy")
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    """Measure and print; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10**7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, *places = arguments.measure
        print(json.dumps(measure_here(path, [int(place) for place in places])))
        return 0
    positions = [0, arguments.samples // 100, arguments.samples // 2]
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        path = write_catalogue(Path(name) / "all.catalogue", arguments.samples)
        size = path.stat().st_size
        found = measure(path, positions)
        load_s = _load_s(Path(name), size)
    ratio = max(found["ready_s"]) / found["ready_s"][0]
    values = {
        "opened_over_np_load": found["opened_s"] / load_s,
        "private_mib": found["private_mib"],
        "ready_ratio": ratio,
    }
    if arguments.json:
        print(json.dumps(found | values))
    else:
        waits = ", ".join(f"{1000 * wait:.1f} ms" for wait in found["ready_s"])
        print(f"{arguments.samples:,} samples, a catalogue of {size / MIB:.0f} MiB")
        print(f"opened in {1000 * found['opened_s']:.1f} ms; np.load: {1000 * load_s:.0f} ms")
        print(f"private memory of a rank: {found['private_mib']:.0f} MiB")
        print(f"first 8 packs at {positions}: {waits} (largest / first: {ratio:.2f})")
    return int(values["opened_over_np_load"] > 2 or values["private_mib"] > 100 or ratio > 1.3)


if __name__ == "__main__":
    run_command(main)
