"""Check this project on a GPU, step by step, and write down what was found.

    make gpu-check                                    on any Linux machine with an NVIDIA GPU
    python -m benchmarks.gpu.check --out runs/gpu-check
    python -m benchmarks.gpu.check --device cpu --tiny     the same code without a GPU

Steps: (1) packed attention kernels against SDPA, forward and backward; (2) a bf16 training step
without a host sync, and its loss; (3) tokens per second, MFU and peak memory of both stages. Needs
torch; what needs more (transformers, deepspeed, flash-attn) is skipped with a reason where that is
missing. Without a GPU nothing is run. Ends with 0, or with 70 if a step failed.
"""

import argparse
import importlib.util
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.results import Status, StepResult, write_report
from data_tools.errors import EXIT_DEFECT, ConfigError, run_command

if TYPE_CHECKING:
    import torch

OUR_PACKAGES = ("benchmarks", "data_tools", "train")
PACKAGES = ("torch", "transformers", "deepspeed", "flash-attn")
NO_GPU = "no NVIDIA GPU: skipped"


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; return the exit code."""
    options = _parse(arguments)
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("this Python has no torch; install it, or set PYTHON to one that has it")
    import torch

    if options.device == "cuda" and (not torch.cuda.is_available() or torch.version.hip):
        print(NO_GPU)
        return 0
    device = torch.device(options.device)
    machine = _machine(device)
    results: list[StepResult] = []
    for name, step in _steps(device, options.tiny, options.repetitions):
        print(f"gpu-check: {name} ...", file=sys.stderr, flush=True)
        results += _run(name, step)
    print(write_report(options.out, machine, results), end="")
    print(f"gpu-check: written to {options.out}/gpu-check.json and .md", file=sys.stderr)
    return EXIT_DEFECT if any(result.status == "failed" for result in results) else 0


def _steps(
    device: "torch.device", tiny: bool, repetitions: int
) -> list[tuple[str, Callable[[], list[StepResult]]]]:
    """Return (name, function) of every step; modules are imported when a step runs."""

    def attention() -> list[StepResult]:
        from benchmarks.gpu.attention import check_attention

        return check_attention(device, tiny=tiny)

    def step() -> list[StepResult]:
        from benchmarks.gpu.step import check_step

        return check_step(device, tiny=tiny)

    def speed() -> list[StepResult]:
        from benchmarks.gpu.speed import measure_speed

        return measure_speed(device, tiny=tiny, repetitions=repetitions)

    return [("attention", attention), ("step", step), ("speed", speed)]


def _run(name: str, step: Callable[[], list[StepResult]]) -> list[StepResult]:
    """Run one step; a missing package skips it, a defect fails it, and the next ones go on."""
    start = time.perf_counter()
    try:
        results = step()
    except ModuleNotFoundError as error:
        is_ours = str(error.name).split(".")[0] in OUR_PACKAGES
        status: Status = "failed" if is_ours else "skipped"
        return [StepResult(name, status, f"{error.name} is not installed")]
    except Exception as error:  # a broken step must not hide what the others find
        return [StepResult(name, "failed", f"{type(error).__name__}: {error}")]
    print(f"gpu-check: {name} done in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return results


def _machine(device: "torch.device") -> dict[str, str]:
    import torch

    found = {"device": "CPU", "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "CUDA": str(torch.version.cuda),
        }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny model and documents")
    parser.add_argument("--repetitions", type=int, default=10, help="timed steps a stage")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
