"""Which question is asked of which page in which epoch: recipe + Sample -> conversation.

A recipe is a list of (template, weight). The choice is a pure function of (seed, key, epoch), so
every rank, worker and resumed run asks the same question.
"""

import json
from dataclasses import dataclass, field

from data_tools.errors import DataError
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
    """One turn of a conversation: `num_images` images, then text."""

    role: str
    spans: tuple[Span, ...]
    num_images: int = 0

    @property
    def text(self) -> str:
        """The turn's text without its images."""
        return "".join(span.text for span in self.spans)

    @property
    def message(self) -> dict:
        """The turn in the form that chat templates take."""
        content: list[dict] = [{"type": "image"}] * self.num_images
        if self.text or not content:
            content.append({"type": "text", "text": self.text})
        is_plain = self.num_images == 0
        return {"role": self.role, "content": self.text if is_plain else content}


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

    def choose(self, key: str, epoch: int) -> int:
        """Return the index of the template for a sample in an epoch."""
        if len(self.templates) == 1:
            return 0
        point = unit_interval(hash_key(self.seed, "task", key, epoch)) * sum(self.weights)
        for index, weight in enumerate(self.weights):
            point -= weight
            if point < 0:
                return index
        return len(self.weights) - 1


def ask(
    sample: Sample, template: Template, resized_wh: list[tuple[int, int]] | None = None
) -> Conversation:
    """Return the conversation that a template makes of a sample.

    Args:
        sample: its `messages` win over any template.
        template: the question.
        resized_wh: (width, height) px of each page as the model sees it; answers with boxes carry
            absolute pixels of the resized page (Qwen2.5-VL's `bbox_2d`). None counts lengths:
            each coordinate then takes four digits.

    Raises:
        DataError: if the sample lacks what the template asks for.
    """
    if sample.messages is not None:
        return _from_messages(sample)
    answer = {"text": _text_spans, "lines": _line_spans, "fields": _field_spans}[template.task]
    spans = answer(sample, template, resized_wh)
    if not spans:
        raise DataError(f'sample "{sample.key}": nothing to answer "{template.name}" with')
    question = Turn("user", (Span(template.prompt),), num_images=len(sample.images))
    return question, Turn("assistant", tuple(spans))


def _text_spans(sample: Sample, template: Template, resized_wh: object) -> list[Span]:
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
    sample: Sample, template: Template, resized_wh: list[tuple[int, int]] | None
) -> list[Span]:
    spans: list[Span] = []
    for annotation in sample.annotations:
        if annotation.bbox is None:
            continue
        box = _answer_box(sample, annotation, resized_wh)
        opening = "[\n" if not spans else ",\n"
        spans.append(Span(f'{opening}{{"bbox_2d": {box}, "text": "', is_markup=True))
        escaped = json.dumps(annotation.text, ensure_ascii=False)[1:-1]
        spans.append(Span(escaped, annotation.category, annotation.weight))
        spans.append(Span('"}', is_markup=True))
    return [*spans, Span("\n]", is_markup=True)] if spans else []


def _answer_box(
    sample: Sample, annotation: Annotation, resized_wh: list[tuple[int, int]] | None
) -> list[int]:
    assert annotation.bbox is not None
    if resized_wh is None:
        return [10**COORDINATE_DIGITS - 1] * 4
    page = sample.images[annotation.image]
    return list(scale_box(annotation.bbox, (page.width, page.height), resized_wh[annotation.image]))


def _field_spans(sample: Sample, template: Template, resized_wh: object) -> list[Span]:
    if not sample.fields:
        return []
    return [Span(template.answer(sample.fields), category="field")]


def _from_messages(sample: Sample) -> Conversation:
    turns = []
    for message in sample.messages or ():
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        num_images = sum(part["type"] == "image" for part in parts)
        text = "".join(part.get("text", "") for part in parts)
        turns.append(Turn(message["role"], (Span(text),), num_images))
    if sum(turn.num_images for turn in turns) != len(sample.images):
        raise DataError(
            f'sample "{sample.key}": the messages show {sum(t.num_images for t in turns)} images, '
            f"the sample holds {len(sample.images)}"
        )
    if not any(turn.role == "assistant" and turn.text for turn in turns):
        raise DataError(f'sample "{sample.key}": the messages hold no answer of the assistant')
    return tuple(turns)
