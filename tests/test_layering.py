"""Imports go down the floors only, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "data_tools": set(),
    "train": {"data_tools"},
    "inference": {"data_tools", "train"},
    "launch": {"data_tools", "train"},
    "benchmarks": {"data_tools", "train", "inference", "launch"},
}
LAUNCH_MAY_IMPORT = {
    "data_tools.errors",
    "train.config",
    "train.ownership",
    "train.ranks",
    "train.rendezvous",
    "train.schema",
    "train.status",
}
NO_DEEPSPEED = ("train/modeling", "train/metrics", "train/generate.py", "inference", "data_tools")
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Return every imported module, `from` imports with their full module name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_from_rooms_below(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    ours = {name for name in imports(path) if name.split(".")[0] in {*MAY_IMPORT, "tests"}}
    foreign = {n for n in ours if n.split(".")[0] not in MAY_IMPORT[room] | {room}}
    assert not foreign
    if room == "launch":
        assert {n for n in ours if not n.startswith("launch")} <= LAUNCH_MAY_IMPORT


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_stay_where_they_belong(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    packages = {name.split(".")[0] for name in imports(path)}
    if relative.startswith(NO_DEEPSPEED):
        assert "deepspeed" not in packages
    top_level = {
        alias.name.split(".")[0]
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "flash_attn" not in top_level


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert outcome.returncode == 0, outcome.stderr
    return set(outcome.stdout.split())


def test_packages_import_without_heavy_ones() -> None:
    loaded = loaded_by("import train, data_tools, inference, launch")
    assert not loaded & {"deepspeed", "flash_attn", "torch", "fastapi"}


def test_launch_and_argument_checks_load_no_torch() -> None:
    assert "torch" not in loaded_by("import launch.chain, launch.quickstart, launch.watchdog")
    assert "torch" not in loaded_by("import launch.pipeline.__main__, launch.preflight.__main__")
    assert "torch" not in loaded_by("import launch.preflight.node_check")
    assert "torch" not in loaded_by(
        "import launch.stage, launch.task, launch.job_command, launch.preflight.node_check"
    )
    assert "torch" not in loaded_by("import train.config, train.ranks, train.shards")


def test_inference_runs_without_deepspeed() -> None:
    assert "deepspeed" not in loaded_by("import inference.reader, inference.evaluate")
