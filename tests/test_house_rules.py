"""Sizes and habits that keep the code readable; `make check` runs this file by itself."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("data_tools", "train", "inference", "launch", "benchmarks", "tests")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
CODE = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tests"]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_FILE_BYTES = 4_000_000
LONG_FUNCTIONS: dict[str, str] = {}  # "file:function": why


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            name = f"{ids(path)}:{node.name}"
            assert length <= MAX_FUNCTION_LINES or name in LONG_FUNCTIONS, f"{name}: {length}"


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_modules_and_public_functions_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        is_named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if is_named and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_no_swallowed_errors_and_no_unnumbered_todo(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            body = [type(statement) for statement in node.body]
            assert body != [ast.Pass], f"line {node.lineno}: an error is swallowed"
            assert node.type is not None, f"line {node.lineno}: a bare except"
    for match in re.finditer(r"# *(TODO|FIXME|XXX)\b(?!\(#\d+\))", text):
        pytest.fail(f"without an issue number: {match.group()}")


PICKLES = {
    "data_tools/stream/wire.py": "messages between a process and its own children, no files",
    "benchmarks/scale.py": "measures np.load on a file of its own (allow_pickle is off)",
    "train/checkpoint/foreign.py": "reads DeepSpeed's files, weights_only with an allow-list",
}


@pytest.mark.parametrize("path", CODE, ids=ids)
def test_no_pickle_is_read(path: Path) -> None:
    if str(path.relative_to(ROOT)) in PICKLES:
        pytest.skip(PICKLES[str(path.relative_to(ROOT))])
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"^\s*import pickle|torch\.load\(|np\.load\(|allow_pickle=True", text, re.M
    )


def test_no_large_file_is_tracked() -> None:
    skipped = {".git", ".venv", "runs", "data", "build", "logs"}
    for path in ROOT.rglob("*"):
        if path.relative_to(ROOT).parts[0] in skipped or not path.is_file():
            continue
        if any(part.startswith(".") and part.endswith("_cache") for part in path.parts):
            continue
        assert path.stat().st_size < MAX_FILE_BYTES, path
