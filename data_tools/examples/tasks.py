"""Which question is asked of which page in which epoch: recipe + Sample -> conversation.

A recipe is a list of (template, weight). The choice is a pure function of (seed, key, epoch), so
every rank, worker and resumed run asks the same question. It falls on what the sample has an answer
for: a page without fields is never asked for them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_tools.errors import ConfigError, DataError
from data_tools.examples.images import scale_box
from data_tools.sample import Annotation, Sample
from data_tools.stream.hashing import hash_key, unit_interval
from data_tools.templates import Template

COORDINATE_DIGITS = 4  # boxes are counted with this many digits before the page is resized


@dataclass(frozen=True)
class Span:
    """A piece of an answer. Markup (brackets, keys, coordinates) has no character weights."""

    text: str
    category: str | None = None
    weight: float = 1.0
    is_markup: bool = False


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: `num_images` images, then text.

    Attributes:
        role: who speaks: user, assistant or system.
        spans: the text.
        num_images: images in this turn.
        parts: texts and images (None) in their order, where images do not simply come first.
    """

    role: str
    spans: tuple[Span, ...]
    num_images: int = 0
    parts: tuple[str | None, ...] = ()

    @property
    def text(self) -> str:
        """The turn's text without its images."""
        return "".join(span.text for span in self.spans)

    @property
    def message(self) -> dict:
        """The turn in the form that chat templates take."""
        if not self.num_images:
            return {"role": self.role, "content": self.text}
        parts = self.parts or (*(None,) * self.num_images, self.text)
        content = [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in parts
            if part != ""
        ]
        return {"role": self.role, "content": content}


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Recipe:
    """Which templates are used, and how often.

    Attributes:
        templates: the questions to choose from.
        weights: their shares, in the same order.
        seed: of the run.
    """

    templates: tuple[Template, ...]
    weights: tuple[float, ...] = field(default=(1.0,))
    seed: int = 0

    def __post_init__(self) -> None:
        is_complete = len(self.weights) == len(self.templates) > 0
        if not is_complete or min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ConfigError(
                f"{len(self.templates)} templates with the weights {self.weights}; expected one "
                "weight of at least 0 for each template, and a positive sum"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values."""
        templates = [t.model_dump(mode="json", by_alias=True) for t in self.templates]
        return {"templates": templates, "weights": list(self.weights), "seed": self.seed}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Recipe":
        """Read what `to_json` wrote."""
        templates = tuple(Template.model_validate(template) for template in record["templates"])
        return cls(templates, tuple(record["weights"]), record["seed"])

    def choose(self, key: str, epoch: int, answerable: Sequence[bool] | None = None) -> int:
        """Return the index of the template for a sample in an epoch.

        Args:
            key: of the sample.
            epoch: counted from 0.
            answerable: which templates the sample has an answer for, all by default; the others are
                never chosen, and the weights of these make up the shares.
        """
        can = answerable if answerable is not None else (True,) * len(self.weights)
        weights = [w if is_able else 0.0 for w, is_able in zip(self.weights, can, strict=True)]
        possible = [index for index, weight in enumerate(weights) if weight > 0]
        if len(possible) == 1:
            return possible[0]
        point = unit_interval(hash_key(self.seed, "task", key, epoch)) * sum(weights)
        for index in possible:
            point -= weights[index]
            if point < 0:
                return index
        return possible[-1]

    def shares(self, answerable: np.ndarray) -> np.ndarray:
        """Return how often each template is chosen for each sample, over many epochs.

        Args:
            answerable: (templates, n) bool.

        Returns:
            (templates, n) float64; the shares of a sample add up to 1.
        """
        weights = np.asarray(self.weights)[:, None] * answerable
        return weights / weights.sum(axis=0)


def ask(
    sample: Sample,
    template: Template,
    resized_wh: list[tuple[int, int]] | None = None,
    *,
    coordinate_digits: int = COORDINATE_DIGITS,
) -> Conversation:
    """Return the conversation that a template makes of a sample.

    Args:
        sample: its `messages` win over any template.
        template: the question.
        resized_wh: (width, height) px of each page as the model sees it; answers with boxes carry
            absolute pixels of the resized page (Qwen2.5-VL's `bbox_2d`). None counts lengths.
        coordinate_digits: what each coordinate takes when lengths are counted.

    Raises:
        DataError: if the sample lacks what the template asks for.
    """
    if sample.messages is not None:
        return _from_messages(sample)
    if template.task == "lines":
        spans = _line_spans(sample, resized_wh, coordinate_digits)
    elif template.task == "fields":
        spans = _field_spans(sample, template)
    else:
        spans = _text_spans(sample)
    if not spans:
        raise DataError(f'sample "{sample.key}": nothing to answer "{template.name}" with')
    question = Turn("user", (Span(template.prompt),), num_images=len(sample.images))
    return question, Turn("assistant", tuple(spans))


def _text_spans(sample: Sample) -> list[Span]:
    if sample.text is not None:
        return [Span(sample.text)]
    spans: list[Span] = []
    previous: Annotation | None = None
    for annotation in sample.annotations:
        if previous is not None:
            same_line = annotation.line is not None and annotation.line == previous.line
            spans.append(Span(" " if same_line else "\n"))
        spans.append(Span(annotation.text, annotation.category, annotation.weight))
        previous = annotation
    return spans


def _line_spans(
    sample: Sample, resized_wh: list[tuple[int, int]] | None, coordinate_digits: int
) -> list[Span]:
    spans: list[Span] = []
    for annotation in sample.annotations:
        if annotation.bbox is None:
            continue
        if resized_wh is None:
            box = [10**coordinate_digits - 1] * 4
        else:
            page, size = sample.images[annotation.image], resized_wh[annotation.image]
            box = list(scale_box(annotation.bbox, (page.width, page.height), size))
        opening = "[\n" if not spans else ",\n"
        spans.append(Span(f'{opening}{{"bbox_2d": {box}, "text": "', is_markup=True))
        escaped = json.dumps(annotation.text, ensure_ascii=False)[1:-1]
        spans.append(Span(escaped, annotation.category, annotation.weight))
        spans.append(Span('"}', is_markup=True))
    return [*spans, Span("\n]", is_markup=True)] if spans else []


def _field_spans(sample: Sample, template: Template) -> list[Span]:
    """Return `template.answer(sample.fields)` in pieces; what is no value is markup."""
    if not sample.fields:
        return []
    spans: list[Span] = []
    if template.answer_form == "json":
        for number, asked in enumerate(template.fields):
            opening = ", " if number else "{"
            name = json.dumps(asked.name, ensure_ascii=False)
            spans.append(Span(f"{opening}{name}: ", is_markup=True))
            spans += _json_value_spans(sample.fields.get(asked.key), asked.key)
        return [*spans, Span("}", is_markup=True)]
    lines = template.answer(sample.fields).split("\n")
    for number, (asked, line) in enumerate(zip(template.fields, lines, strict=True), start=1):
        opening = f"{number}. {asked.name}:"
        spans.append(Span(opening if number == 1 else f"\n{opening}", is_markup=True))
        spans.append(Span(line[len(opening) :], asked.key))
    return spans


def _json_value_spans(value: str | list[str] | None, category: str) -> list[Span]:
    if value is None:
        return [Span("null", is_markup=True)]
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
        return [Span('"', is_markup=True), Span(text[1:-1], category), Span('"', is_markup=True)]
    spans = [Span("[", is_markup=True)]
    for number, item in enumerate(value):
        if number:
            spans.append(Span(", ", is_markup=True))
        spans += _json_value_spans(item, category)
    return [*spans, Span("]", is_markup=True)]


def _from_messages(sample: Sample) -> Conversation:
    try:
        turns = [_turn(message) for message in sample.messages or ()]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'sample "{sample.key}": malformed messages ({error!r}); expected a list of '
            '{"role", "content"}, a content being a text or a list of {"type": "image"} and '
            '{"type": "text", "text"}'
        ) from error
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.text]
    if not answers:
        raise DataError(f'sample "{sample.key}": the messages hold no answer of the assistant')
    turns = turns[: answers[-1] + 1]  # nothing can be learned from what follows
    if (num_images := sum(turn.num_images for turn in turns)) != len(sample.images):
        raise DataError(
            f'sample "{sample.key}": the messages show {num_images} images up to the last answer, '
            f"the sample holds {len(sample.images)}"
        )
    return tuple(turns)


def _turn(message: dict) -> Turn:
    """Return the turn of a message; KeyError or TypeError if it is malformed."""
    content = message["content"]
    if isinstance(content, str):
        return Turn(str(message["role"]), (Span(content),))
    texts = [part["text"] for part in content if part["type"] != "image"]
    text = "".join(texts)  # TypeError where one is no text
    parts = tuple(None if part["type"] == "image" else part["text"] for part in content)
    return Turn(str(message["role"]), (Span(text),), parts.count(None), parts)
