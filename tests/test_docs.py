"""The documentation names every configuration key, and nothing that does not exist."""

import importlib.util
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from train.config import Config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
MODULE = re.compile(r"python -m ([\w.]+)")
FILE = re.compile(r"(?<![\w/.<])((?:slurm|configs|train|tests)/[\w./-]+\.(?:sh|yaml|py))\b")


def key_paths(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the path of every key of a section, `[]` behind a list."""
    paths = []
    for name, field in section.model_fields.items():
        if prefix == "data." and name == "preprocess":
            paths.append("data.preprocess")  # its transforms have a table of their own
            continue
        inner, is_list = _inner_section(field.annotation)
        paths.append(f"{prefix}{name}")
        if inner is not None:
            paths += key_paths(inner, f"{prefix}{name}{'[]' if is_list else ''}.")
    return paths


def _inner_section(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    is_list = getattr(annotation, "__origin__", None) is list
    for argument in getattr(annotation, "__args__", ()):
        inner, _ = _inner_section(argument)
        if inner is not None:
            return inner, is_list
    return None, False


SECTIONS = set(Config.model_fields)
KEYS = [path for path in key_paths(Config) if path not in SECTIONS]


def test_every_key_is_documented_and_every_documented_key_exists() -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([a-z]+\.[\w.\[\]]+)` \|", text, re.M))
    assert sorted(documented) == sorted(KEYS)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_modules_and_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in MODULE.findall(text):
        assert importlib.util.find_spec(name.rstrip(".")) is not None, name
    for name in FILE.findall(text):
        assert (ROOT / name).exists() or "NAME" in name, name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8")):
        assert name in targets, name
