"""The result of an evaluation, as a table for people: plain text and Markdown."""

from dataclasses import dataclass

from train.metrics import Confusion, FieldReport, Interval, LineReport, TextReport

TOP_CONFUSIONS = 10


@dataclass(frozen=True)
class Evaluation:
    """What was read and how well; `dataclasses.asdict` of it is the content of report.json.

    Attributes:
        shards: patterns as given.
        template: name of the question.
        unit: page or line.
        num_samples: samples compared.
        num_unfinished: answers that were cut off at the limit of tokens.
        left_out: reason -> samples that were not compared.
        seconds: of reading and comparing.
        text: metrics of the texts.
        fields: metrics of fields, for templates that ask for fields.
        lines: metrics of boxed lines, for templates that ask for them.
    """

    shards: tuple[str, ...]
    template: str
    unit: str
    num_samples: int
    num_unfinished: int
    left_out: dict[str, int]
    seconds: float
    text: TextReport
    fields: FieldReport | None
    lines: LineReport | None


def table(evaluation: Evaluation) -> str:
    """Return the figures as aligned plain text."""
    rows = _rows(evaluation)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    confusions = _confusions(evaluation)
    if confusions:
        lines += ["", "most frequent confusions (read instead of written)"]
        lines += [f"  {c.count:>5}  {_shown(c)}" for c in confusions]
    return "\n".join(lines) + "\n"


def markdown(evaluation: Evaluation) -> str:
    """Return the figures as a Markdown page."""
    lines = ["# Evaluation", "", "| figure | value |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in _rows(evaluation)]
    if evaluation.fields is not None:
        lines += [
            "",
            "| field | P | R | F1 | typed F1 | ANLS |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for name, scores in evaluation.fields.per_field.items():
            strict = scores.strict
            figures = (strict.precision, strict.recall, strict.f1, scores.typed.f1, scores.anls)
            lines.append(f"| {_cell(name)} | " + " | ".join(f"{x:.4f}" for x in figures) + " |")
    confusions = _confusions(evaluation)
    if confusions:
        lines += ["", "| count | confusion |", "| --- | --- |"]
        lines += [f"| {c.count} | {_cell(_shown(c))} |" for c in confusions]
    lines += ["", "Intervals are percentile bootstrap intervals over documents."]
    return "\n".join(lines) + "\n"


def _rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    text = evaluation.text
    rows = [
        ("samples", f"{evaluation.num_samples} in {text.num_groups} documents"),
        ("template", f"{evaluation.template} ({evaluation.unit})"),
        ("CER", _interval(text.cer.micro)),
        ("CER macro, median", f"{text.cer.macro:.4f}, {text.cer.median:.4f}"),
        ("WER", _interval(text.wer.micro)),
        ("character accuracy", f"{max(0.0, text.character_accuracy):.4f}"),
        ("exact match", _interval(text.exact_match)),
    ]
    if fields := evaluation.fields:
        strict = fields.strict
        rows += [
            ("field F1", _interval(fields.f1)),
            ("field P, R", f"{strict.precision:.4f}, {strict.recall:.4f}"),
            ("field F1, typed", f"{fields.typed.f1:.4f}"),
            ("ANLS", f"{fields.anls:.4f}"),
            ("tree edit accuracy", f"{fields.tree_edit_accuracy:.4f}"),
            ("E2E accuracy, documents", _interval(fields.e2e_accuracy)),
            ("E2E accuracy, typed", _interval(fields.e2e_accuracy_typed)),
            ("unreadable answers", str(fields.num_unreadable)),
        ]
    if lines := evaluation.lines:
        rows += [
            ("E2E F1, boxed lines", _interval(lines.f1)),
            ("E2E P, R", f"{lines.end_to_end.precision:.4f}, {lines.end_to_end.recall:.4f}"),
            ("lines found, F1", f"{lines.detection.f1:.4f}"),
        ]
    ignored = [name for name, is_on in vars(text.options).items() if is_on]
    if ignored:
        rows.append(("normalisation", ", ".join(ignored)))
    if evaluation.num_unfinished:
        rows.append(("answers cut off", str(evaluation.num_unfinished)))
    rows += [(f"left out: {why}", str(count)) for why, count in evaluation.left_out.items()]
    return rows


def _interval(interval: Interval) -> str:
    share = f"{100 * interval.level:.0f} %"
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}] {share}"


def _confusions(evaluation: Evaluation) -> tuple[Confusion, ...]:
    return evaluation.text.confusions[:TOP_CONFUSIONS]


def _shown(confusion: Confusion) -> str:
    """Return `written -> read`; ε is nothing, ␣ a space, and control characters are numbers."""
    return f"{_visible(confusion.reference)} -> {_visible(confusion.hypothesis)}"


def _visible(side: str) -> str:
    plain = side.replace(" ", "␣") or "ε"
    return plain if plain.isprintable() else " ".join(f"U+{ord(c):04X}" for c in side)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
