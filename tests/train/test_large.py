"""Models of 4 GB and more: what a rank holds while it loads, what an export holds."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import FOUR_ZERO_SETTINGS, run_ranks
from tests.train.checkpoint_files import write_checkpoint
from train.checkpoint.files import write_safetensors
from train.modeling import tiny
from train.modeling.names import hub_name

GB = 10**9
PAGE_BYTES = 4096


def anonymous_bytes(pid: int | str = "self") -> int:
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(shared)) * PAGE_BYTES


class Peak:
    """The most anonymous memory of this process above that at the beginning."""

    def __enter__(self) -> "Peak":
        self._start, self.bytes, self._is_over = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_over.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


def large_config() -> dict[str, Any]:
    """Return a config of 2.2 billion parameters, 4.3 GB in bf16."""
    config = tiny.tiny_config(hidden=2048, layers=17)
    for part in (config, config.get("text_config", {})):
        if "intermediate_size" in part:
            part["intermediate_size"] = 11008
    return config


def write_large_model(folder: Path) -> int:
    """Write a model folder whose weights are one file of zeros and ones; return its bytes."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    config = large_config()
    tiny.write_model_files(folder, config)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    shapes = {hub_name(name): tuple(p.shape) for name, p in model.named_parameters()}
    layout = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    tensors = (torch.ones(shape, dtype=torch.bfloat16) for shape in shapes.values())
    return write_safetensors(folder / "model.safetensors", layout, tensors)


def load_in_part(folder: Path) -> tuple[int, int, int]:
    """Return (peak anonymous bytes, bytes of this rank's share, bytes of the largest tensor)."""
    from transformers.integrations import HfDeepSpeedConfig

    from train.initial_load import load_model

    zero = {"stage": 3, **FOUR_ZERO_SETTINGS}
    alive = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero,
            "bf16": {"enabled": True},
        }
    )
    attention = {"text_config": "sdpa", "vision_config": "sdpa"}
    with Peak() as peak:
        model = load_model(str(folder), precision="bf16", attention=attention)
    del alive
    parts = list(model.parameters())
    assert all(float(p.ds_tensor[0]) == 1 for p in parts if p.ds_tensor.numel())
    share = sum(p.ds_tensor.numel() * 2 for p in parts)
    return peak.bytes, share, max(p.ds_numel * 2 for p in parts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_holds_its_share_while_a_model_of_4_gb_is_loaded(tmp_path: Path) -> None:
    size = write_large_model(tmp_path)
    assert size > 4 * GB
    for peak, share, largest in run_ranks(4, load_in_part, tmp_path, timeout_s=600):
        print(f"{size / GB:.2f} GB: peak {peak / GB:.2f} GB, share {share / GB:.2f} GB")
        assert share <= size / 4 * 1.01
        assert peak < size / 4 + largest + GB


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_export_of_4_gb_adds_under_100_mb(tmp_path: Path) -> None:
    count = 64
    tensors = {f"fp32|layer{i}.weight": torch.full((4096, 4096), float(i)) for i in range(count)}
    parameters = {key.split("|")[1]: {"shape": [4096, 4096], "trainable": True} for key in tensors}
    write_checkpoint(tmp_path / "ours", tensors, 2, 1, parameters)
    del tensors
    code = (
        "import sys, time; from pathlib import Path; import torch\n"
        "from train.checkpoint.hub import check_weights, write_weights\n"
        "from train.checkpoint.weights import Origin, TrainedWeights\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "folder, origin = Path(sys.argv[1]), Origin((Path(sys.argv[2]),))\n"
        "digests = write_weights(folder, origin, torch.float32, 10**9)\n"
        "check_weights(folder, TrainedWeights(origin).shapes(), torch.float32, digests)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out), str(tmp_path / "ours" / "step-00000001")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    idle = peak = anonymous_bytes(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    while process.poll() is None:
        try:
            peak = max(peak, anonymous_bytes(process.pid))
        except (FileNotFoundError, ValueError):
            break
        time.sleep(0.005)
    assert process.wait() == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == count * 4096 * 4096 * 4 > 4 * GB
    print(f"peak {(peak - idle) / 1e6:.0f} MB")
    assert peak - idle < 100e6
