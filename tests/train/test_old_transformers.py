"""An exported folder read by transformers 4.57, which vLLM and others still use.

    pip install --target FOLDER --no-deps transformers==4.57.6 tokenizers==0.22.2 \
        huggingface_hub==0.36.0
    LECTERN_OLD_TRANSFORMERS=FOLDER pytest tests/train/test_old_transformers.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_export import write_vision_stage
from train.export import export

LOGITS = """
import sys, torch, transformers
from safetensors.torch import save_file
from transformers import Qwen2_5_VLForConditionalGeneration

model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
    sys.argv[1], dtype=torch.float32, attn_implementation="eager", output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
config, draw = model.config, torch.Generator().manual_seed(0)
text = torch.randint(0, 200, (12,), generator=draw)
start, pad = torch.tensor([config.vision_start_token_id]), torch.full((4,), config.image_token_id)
ids = torch.cat([start, pad, text])[None]
inputs = {
    "input_ids": ids,
    "pixel_values": torch.randn(16, 1176, generator=draw),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
    "attention_mask": torch.ones_like(ids),
}
if transformers.__version__ >= "5":
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
with torch.no_grad():
    logits = model.eval()(**inputs).logits
save_file({"logits": logits.contiguous()}, sys.argv[2])
print(transformers.__version__)
"""


@pytest.fixture
def old_packages() -> str:
    folder = os.environ.get("LECTERN_OLD_TRANSFORMERS")
    if not folder:
        pytest.skip("LECTERN_OLD_TRANSFORMERS names no folder with transformers 4.57")
    return folder


@pytest.mark.timeout(200)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_installed_version(
    tmp_path: Path, old_packages: str, tied: bool
) -> None:
    stage, _ = write_vision_stage(tmp_path, tied=tied)
    folder = export(stage, dtype="fp32")
    logits = {}
    for name, packages in (("new", ""), ("old", old_packages)):
        done = subprocess.run(
            [sys.executable, "-c", LOGITS, str(folder), str(tmp_path / name)],
            env=os.environ | {"PYTHONPATH": packages, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("5." if name == "new" else "4.57")
        logits[name] = load_file(tmp_path / name)["logits"]
    assert torch.equal(logits["new"], logits["old"])
