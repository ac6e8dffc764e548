"""The benchmark environment: packages of others, kept out of the locked one, and what they need.

`make bench-env` installs benchmarks/requirements.txt into build/bench-env. It is put at the end of
the search path, so that nothing in it replaces a package of the locked environment.
"""

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "build" / "bench-env"
MISSING = "not installed: make bench-env"
PACKAGES = (
    "torch", "transformers", "pillow", "simplejpeg", "webdataset", "torchvision",
    "megatron-energon",
)  # fmt: skip

_operators: list[Any] = []  # a library of operators lives as long as its object


def add_bench_env() -> None:
    """Make the packages of build/bench-env importable; those that are there already come first.

    To be called before transformers is used: it imports torchvision where it finds it.
    """
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if has_torchvision() and not _operators:
        import torch

        # The compiled operators of its CUDA build do not load beside a CPU torch, and it asks for
        # these two by name when it is imported. Declared, they may stay without a body: images
        # never call them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.append(library)


def has_torchvision() -> bool:
    """Return whether torchvision is installed."""
    return importlib.util.find_spec("torchvision") is not None


def has_energon() -> bool:
    """Return whether Megatron-Energon is installed."""
    return (
        importlib.util.find_spec("megatron") is not None
        and importlib.util.find_spec("megatron.energon") is not None
    )


def versions() -> dict[str, str]:
    """Return the release of every package that takes part."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = MISSING
    return found
