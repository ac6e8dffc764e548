"""Prompt and field templates: what is asked of a page, and how the answer is written and read.

A template is a YAML file: the shipped ones lie beside this module and go by name (`text-en`), one
of the user's own goes by path (`my/invoice.yaml`).
"""

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_tools.errors import ConfigError

__all__ = ["Template", "TemplateField", "load_template", "template_names"]

FOLDER = Path(__file__).parent
EXTENSION = ".yaml"

FieldValue = str | list[str] | None

_NUMBERED_LINE = re.compile(r"\s*(\d+)\s*[.、．)]\s*([^:：]+?)\s*[:：](.*)")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TemplateField(_Section):
    """One field that is asked for."""

    name: str = Field(min_length=1, description="how the prompt and the answer call it")
    key: str = Field(min_length=1, description="its name in the fields of a sample")
    type: Literal["text", "date", "currency", "number"] = Field(
        default="text", description="how values are compared"
    )


class Template(_Section):
    """A question about a page.

    The task says what the answer is made of: `text` the transcription, `lines` a JSON list of
    {"bbox_2d", "text"}, `fields` the values of the named fields.
    """

    name: str = Field(min_length=1, description="what configurations call it")
    task: Literal["text", "lines", "fields"] = Field(description="what is asked for")
    language: str = Field(min_length=2, description="of the prompt: en, zh")
    prompt: str = Field(default="", description="the user's text after the image, may be empty")
    fields: tuple[TemplateField, ...] = Field(
        default=(), strict=False, description="what the task `fields` asks for, in order"
    )
    answer_form: Literal["json", "numbered"] = Field(
        default="json", alias="answer", description="how the task `fields` is answered"
    )

    @model_validator(mode="after")
    def _check_fields(self) -> "Template":
        if bool(self.fields) != (self.task == "fields"):
            raise ValueError("`fields` must be listed for the task fields, and only for it")
        for attribute in ("name", "key"):
            values = [getattr(field, attribute) for field in self.fields]
            repeated = sorted({value for value in values if values.count(value) > 1})
            if repeated:
                raise ValueError(f"two fields have the same {attribute} {', '.join(repeated)}")
        return self

    def answer(self, fields: dict[str, Any]) -> str:
        """Return the answer that carries these fields of a sample, in the template's order.

        A field that the sample lacks is null in JSON and empty in a numbered list. A numbered list
        has one line a field, so white space in its values becomes one blank.
        """
        if self.answer_form == "json":
            values = {field.name: fields.get(field.key) for field in self.fields}
            return json.dumps(values, ensure_ascii=False)
        return "\n".join(
            f"{number}. {field.name}:{_one_line(fields.get(field.key))}"
            for number, field in enumerate(self.fields, start=1)
        )

    def parse(self, text: str) -> dict[str, FieldValue]:
        """Return field key -> value from an answer, the inverse of `answer`.

        Code fences and words around the answer are tolerated; fields that are not the template's
        are dropped; an answer that cannot be read gives no fields.
        """
        return self._parse_json(text) if self.answer_form == "json" else self._parse_lines(text)

    def _parse_json(self, text: str) -> dict[str, FieldValue]:
        keys = {field.name: field.key for field in self.fields}
        values = _first_object(text)
        return {keys[name]: _value(value) for name, value in values.items() if name in keys}

    def _parse_lines(self, text: str) -> dict[str, FieldValue]:
        keys = {field.name: field.key for field in self.fields}
        found: dict[str, FieldValue] = {}
        for line in text.splitlines():
            match = _NUMBERED_LINE.fullmatch(line)
            if match and match.group(2) in keys:
                found[keys[match.group(2)]] = match.group(3).strip() or None
        return found


def template_names() -> list[str]:
    """Return the names of the shipped templates."""
    return sorted(path.stem for path in FOLDER.glob(f"*{EXTENSION}"))


def load_template(name_or_path: str) -> Template:
    """Load a shipped template by name, or one of the user's own by the path of its YAML file.

    Raises:
        ConfigError: if there is no such template, or its file breaks the schema.
    """
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
    else:
        path = FOLDER / f"{name_or_path}{EXTENSION}"
        if not path.is_file():
            near = get_close_matches(name_or_path, template_names(), n=1, cutoff=0.0)
            raise ConfigError(
                f'no template "{name_or_path}"; did you mean "{near[0]}"? Shipped are '
                f"{', '.join(template_names())}; give a path ending in .yaml for one of your own"
            )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"template {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"template {path}: not YAML ({error})") from error
    try:
        return Template.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"template {path}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    known = {"name", "task", "language", "prompt", "fields", "answer", "key", "type"}
    problems = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "the template"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = get_close_matches(str(problem["loc"][-1]), sorted(known), n=1, cutoff=0.0)
            message = f"unknown key, did you mean {near[0]}?"
        problems.append(f"{place}: {message}")
    return "; ".join(problems)


def _first_object(text: str) -> dict[str, Any]:
    """Return the first JSON object in a text, whatever stands around it; {} if there is none."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            return dict(decoder.raw_decode(text, match.start())[0])
        except (ValueError, RecursionError):
            continue  # not the beginning of an object, or one that is cut off
    return {}


def _one_line(value: FieldValue) -> str:
    text = "; ".join(value) if isinstance(value, list) else value or ""
    return " ".join(text.split())


def _value(value: Any) -> FieldValue:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return [item if isinstance(item, str) else json.dumps(item) for item in value]
    return json.dumps(value, ensure_ascii=False)
