"""Strict YAML: sections, files that extend others, overrides, and every error at once."""

import difflib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_tools.errors import ConfigError


class Section(BaseModel):
    """A section of a configuration: unknown keys and wrong kinds are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


AnySection = TypeVar("AnySection", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-5 as text; people who write learning rates mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping and what it extends, the nearer file winning key by key.

    Raises:
        ConfigError: if a file cannot be read or holds no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        record = yaml.load(text, _Loader)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; `ls configs/` shows what is shipped"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{path}: expected sections (run, model, data, ...), got {record!r}")
    base = record.pop("extends", None)
    return _merge(read_yaml(Path(path).parent / base), record) if base else record


def apply_override(
    record: dict[str, Any],
    override: str,
    split: Callable[[str], list[str]] = lambda key: key.split("."),
) -> None:
    """Set one `key.path=value` in a record.

    Args:
        record: to be changed.
        override: its value is YAML.
        split: a key's path into the keys to descend by.

    Raises:
        ConfigError: if it is no assignment, or leads through what is no section.
    """
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r}: expected key.path=value, as optim.lr=5e-6")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is no valid YAML: {error}") from error
    *parents, last = split(key.strip())
    for parent in parents:
        record[parent] = record.get(parent) or {}
        record = record[parent]
        if not isinstance(record, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section")
    record[last] = value


def validate(
    section: type[AnySection],
    record: dict[str, Any],
    path: str | Path,
    required_of_user: Collection[str] = (),
) -> AnySection:
    """Return a record as a section.

    Args:
        section: what it must be.
        record: as read.
        path: of its file, for messages.
        required_of_user: keys that no shipped file can set.

    Raises:
        ConfigError: one message that lists every error with its key path and a suggestion.
    """
    try:
        return section.model_validate(record)
    except ValidationError as error:
        lines = sorted({_explain(section, item, required_of_user) for item in error.errors()})
        raise ConfigError(f"{path}:\n  " + "\n  ".join(lines)) from None


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(top: type[Section], item: Any, required_of_user: Collection[str]) -> str:
    """Put one of pydantic's errors into a sentence with the key's path and a suggestion."""
    place = [str(part) for part in item["loc"]]
    path = ".".join(place)
    if item["type"] == "extra_forbidden":
        known = _known_keys(top, place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        advice = f" Did you mean {'.'.join([*place[:-1], near[0]])}?" if near else ""
        return f"{path} is not a known key.{advice}"
    if item["type"] == "missing":
        return f"{path} must be set{' (yours to set)' if path in required_of_user else ''}"
    if not path:
        return item["msg"].removeprefix("Value error, ")
    return f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _known_keys(top: type[Section], place: list[str]) -> list[str]:
    section: Any = top
    for part in place:
        if part.isdigit():
            continue
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        section = _section_of(field.annotation) if field else None
    return list(section.model_fields) if section is not None else []


def _section_of(annotation: Any) -> Any:
    """Return the section inside `X`, `X | None` or `list[X]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
