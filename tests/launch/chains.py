"""A whole chain that is small enough for a test: documents, a model, two stages, a report."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.builders import make_sample, run_record, write_run
from tests.train.tiny import tiny_folder

NUM_DOCUMENTS, NUM_HELD_OUT = 24, 4
ONE_RANK_A_NODE = {"nodes": 2, "ntasks-per-node": 1, "time": "00:10:00"}


def write_documents(folder: Path) -> Path:
    """Write images and the labels of documents; the last few are for validation."""
    (folder / "images").mkdir(parents=True)
    entries = []
    for number in range(NUM_DOCUMENTS):
        sample = make_sample(number)
        (folder / "images" / f"{sample.key}.png").write_bytes(sample.image_bytes[0])
        entries.append(
            {
                "image_path": f"images/{sample.key}.png",
                "annotations": [{"bbox": a.bbox, "text": a.text} for a in sample.annotations],
                "fields": sample.fields,
                "split": "val" if number >= NUM_DOCUMENTS - NUM_HELD_OUT else "train",
            }
        )
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def write_chain(folder: Path, **changes: Any) -> Path:
    """Write documents, a model and the YAML of a chain; return pipeline.yaml.

    Args:
        folder: of everything; the run goes to folder/run.
        changes: sections of pipeline.yaml.
    """
    model = tiny_folder(folder / "model")
    write_documents(folder / "documents")
    shards = folder / "shards"
    stages = []
    for number in (1, 2):
        record = run_record(folder / "unused", model, [str(shards / "train-000000.tar")])
        record["stage"] = {"number": number, "epochs": 50, "max_steps": 3}
        for key in ("train", "validation"):
            del record["data"][key]
        stages.append(str(write_run(folder / f"stage{number}.yaml", record)))
    content = {
        "run": str(folder / "run"),
        "shard": {
            "source": str(folder / "documents"),
            "out": str(shards),
            "size_mb": 0.01,
            "tasks": 2,
        },
        "stage1": {"config": stages[0], "sbatch": ONE_RANK_A_NODE},
        "stage2": {"config": stages[1], "sbatch": ONE_RANK_A_NODE},
        "evaluate": {
            "data": f"{shards}/val-*.tar",
            "template": "text-plain",
            "max_new_tokens": 4,
            "device": "cpu",
        },
    }
    return write_run(folder / "pipeline.yaml", content | changes)


def figures(folder: Path) -> dict[str, Any]:
    """Return what a finished chain has made: weights of both exports, figures of the report."""
    found: dict[str, Any] = {}
    for stage in ("stage1", "stage2"):
        weights = load_file(folder / "run" / stage / "hf" / "model.safetensors")
        found |= {f"{stage} {name}": tensor.tolist() for name, tensor in weights.items()}
    report = json.loads((folder / "run" / "stage2" / "report" / "report.json").read_text())
    found["report"] = {key: report[key] for key in ("num_samples", "text", "left_out", "template")}
    return found
