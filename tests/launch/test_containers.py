"""The GPU versions of constraints, lock file and container recipe agree."""

import re

from packaging.version import Version

from tests.launches import ROOT


def pins(name: str) -> dict[str, str]:
    """Return package -> version of a file of exact versions."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def test_constraints_agree_with_what_is_tested() -> None:
    gpu, tested = pins("constraints-gpu.txt"), pins("requirements.lock")
    assert gpu["torch"] == tested["torch"]
    assert {name: gpu[name] for name in gpu if name in tested} == {
        name: tested[name] for name in gpu if name in tested
    }


def test_flash_attn_is_what_the_extra_asks_for() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    wanted = re.search(r'"flash-attn>=([\d.]+)"', text)
    assert wanted is not None
    assert Version(pins("constraints-gpu.txt")["flash-attn"]) >= Version(wanted[1])


def test_the_container_has_the_cuda_of_the_constraints() -> None:
    recipe = (ROOT / "containers" / "Dockerfile").read_text(encoding="utf-8")
    image = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)\.\d+-devel-", recipe, re.MULTILINE)
    assert image is not None
    assert pins("constraints-gpu.txt")["cuda-toolkit"].startswith(f"{image[1]}.")
    assert recipe.count("-c constraints-gpu.txt") == 3  # torch, all others, flash-attn
