"""What the GPU check found: one record a step, written as JSON and as a Markdown table."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped", "measured"]


@dataclass(frozen=True)
class StepResult:
    """One step of the check.

    Attributes:
        name: of the step.
        status: passed or failed for a claim, measured for numbers, skipped with a reason.
        reason: why it failed or was skipped; empty otherwise.
        values: figures, with their unit in the name.
    """

    name: str
    status: Status
    reason: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def write_report(out: Path, machine: dict[str, str], results: list[StepResult]) -> str:
    """Write `gpu-check.json` and `gpu-check.md` into `out`; return the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "steps": [asdict(result) for result in results]}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (out / "gpu-check.json").write_text(text + "\n", encoding="utf-8")
    page = _markdown(machine, results)
    (out / "gpu-check.md").write_text(page, encoding="utf-8")
    return page


def _markdown(machine: dict[str, str], results: list[StepResult]) -> str:
    lines = ["# GPU check", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", "| step | result | figures |", "| --- | --- | --- |"]
    for result in results:
        figures = "; ".join(f"{name} {_short(value)}" for name, value in result.values.items())
        cell = f"{figures} {result.reason}".strip().replace("|", "/").replace("\n", " ")
        lines.append(f"| {result.name} | {result.status} | {cell} |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
