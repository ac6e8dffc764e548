"""The README.md of an exported folder: what the model is, how well it reads, how to serve it."""

import json
from pathlib import Path
from typing import Any

import yaml

from data_tools.errors import LecternError
from data_tools.templates import load_template
from train.checkpoint.manifest import Manifest

READER_FILE = "lectern.json"
HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [ocr, document-understanding, qwen2.5-vl]
---
# {name}

Qwen2.5-VL trained with Lectern to read documents: `{stage}`, {steps}, started from `{base}`.
{trained} of {total} parameter tensors were trained; weights are stored in {dtype}. Written with
{libraries}. The licence of the base model applies.

| | |
| --- | --- |
| unit | {unit} |
| page size | {min_pixels} to {max_pixels} pixels, sides of multiples of 28 |
| page transforms | {transforms} |
| data | {data} |
| fingerprint of the data settings | {fingerprint} |
| data seen | {seen} |

The question that the model was asked in training, word for word:

```text
{question}
```
"""

USE = """## Read documents

```bash
python -m inference.predict {name} page.png
```

The command (of Lectern) applies what `{reader}` says: transforms, pixel limits, question. Any
program for Qwen2.5-VL reads the folder as it is:

```python
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

model = Qwen2_5_VLForConditionalGeneration.from_pretrained("{name}", dtype="auto")
processor = AutoProcessor.from_pretrained("{name}")  # needs torchvision
```

`generate` then applies the base model's `generation_config.json`; the metrics were measured by
greedy decoding without a repetition penalty (`do_sample=False, repetition_penalty=1.0`).

## Serve with vLLM

From the folder that holds `{name}`:

```bash
vllm serve {name} --limit-mm-per-prompt '{{"image": 4}}' \\
    --mm-processor-kwargs '{{"min_pixels": {min_pixels}, "max_pixels": {max_pixels}}}'
```

```bash
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'
```

Replace the data URL by one of your page, and ask the question above.{warning}
vLLM was not run by the export; names and files are those of the published model.
"""


def model_card(
    stage: Path, config: dict[str, Any], manifest: Manifest, marker: dict[str, Any], name: str
) -> str:
    """Return the README.md of an exported folder.

    Args:
        stage: RUN/stageN.
        config: of the stage.
        manifest: of the checkpoint, the newest one of an average.
        marker: `steps`, `shares` and `dtype` of the export.
        name: of the folder.
    """
    data, task = config["data"], config["task"]
    question = _question(task["templates"][0]["name"])
    limits = {"min_pixels": data["min_pixels"], "max_pixels": data["max_pixels"]}
    transforms = [transform["name"] for transform in data["preprocess"]]
    about = {
        "name": name,
        "stage": stage,
        "steps": _steps(marker),
        "base": config["model"]["path"],
        "trained": sum(1 for about in manifest.parameters.values() if about["trainable"]),
        "total": len(manifest.parameters),
        "dtype": marker["dtype"],
        "libraries": ", ".join(f"{lib} {number}" for lib, number in manifest.versions.items()),
        "unit": task["unit"],
        "question": question or "(none: the image alone)",
        "transforms": ", ".join(transforms) or "none",
        **_data_rows(config, manifest),
        **limits,
    }
    warning = ""
    if transforms:
        warning = (
            f" vLLM does not know `{READER_FILE}`: apply the page transforms before you send a "
            "page (`data_tools.examples.preprocess`)."
        )
    use = USE.format(
        name=name, reader=READER_FILE, request=_request(name, question), warning=warning, **limits
    )
    settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip()
    parts = [
        HEAD.format(**about),
        _metrics(stage, marker["steps"]),
        use,
        f"## Configuration\n\n```yaml\n{settings}\n```\n",
    ]
    return "\n".join(part for part in parts if part)


def _steps(marker: dict[str, Any]) -> str:
    steps = ", ".join(map(str, marker["steps"]))
    if len(marker["steps"]) == 1:
        return f"step {steps}"
    shares = ", ".join(f"{share:.3f}" for share in marker["shares"])
    return f"the average of steps {steps} (shares {shares})"


def _data_rows(config: dict[str, Any], manifest: Manifest) -> dict[str, str]:
    sources = config["data"].get("train") or []
    state = manifest.state.get("data") or {}
    settings = state.get("settings") or {}
    shards = ", ".join(f"`{digest}`" for digest in state.get("shards") or [])
    fingerprint = ", ".join(f"{key} `{digest}`" for key, digest in settings.items())
    return {
        "data": ", ".join(f"`{source['shards']}`" for source in sources) or "not recorded",
        "fingerprint": f"shards {shards}; {fingerprint}" if settings else "not recorded",
        "seen": f"{sum(state['cursors'])} samples drawn" if "cursors" in state else "not recorded",
    }


def _question(template: str) -> str:
    try:
        return load_template(template).prompt
    except LecternError:
        return f"(of template {template})"


def _request(name: str, question: str) -> str:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}
    content = [image, {"type": "text", "text": question}] if question else [image]
    messages = [{"role": "user", "content": content}]
    # vLLM would take a repetition penalty from the published generation_config.json.
    request = {"model": name, "messages": messages, "temperature": 0, "repetition_penalty": 1.0}
    return json.dumps(request, ensure_ascii=False).replace("'", "'\\''")


def _metrics(stage: Path, steps: list[int]) -> str:
    """Return the table of the validation of these weights, or of the last one; "" without any."""
    found = _validation_of(stage / "log.jsonl", steps[0]) if len(steps) == 1 else {}
    note = ""
    if not found:
        try:
            status = json.loads((stage / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        found, step = status.get("metrics") or {}, status.get("metrics_step")
        if step is not None and [step] != steps:
            note = f"Measured at step {step} of the training, not with these weights.\n"
    rows = [f"| {k} | {v} |" for k, v in found.items() if isinstance(v, int | float | str)]
    if not rows:
        return ""
    head = ["## Metrics on the validation sample", "", *([note] if note else [])]
    return "\n".join([*head, "| metric | value |", "| --- | --- |", *rows, ""])


def _validation_of(log: Path, step: int) -> dict[str, Any]:
    """Return what the log of a stage says of the validation at a step."""
    found: dict[str, Any] = {}
    if not log.is_file():
        return found
    with log.open(encoding="utf-8") as lines:
        for line in lines:
            if '"validation/' not in line:
                continue
            try:
                record = json.loads(line)
            except ValueError:  # it is being written
                continue
            if record.get("step") == step:
                found |= {k: round(v, 5) for k, v in record.items() if k.startswith("validation/")}
    return found
