"""A tiny exported folder, pages that carry a number, and a decoder that knows the answers."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from train.modeling.tiny import tiny_config, write_model_files

LIMITS = {"min_pixels": 784, "max_pixels": 200_704}


def export_tiny(folder: Path, **settings) -> Path:
    """Write a tiny random model as an exported folder; `settings` go into lectern.json."""
    write_model_files(folder, tiny_config(hidden=64, layers=2))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    record = {"version": 1, "unit": "page", "template": "text-en", "preprocess": []} | LIMITS
    (folder / "lectern.json").write_text(json.dumps(record | settings))
    return folder


def page(number: int, width: int = 112, height: int = 84) -> np.ndarray:
    """Return an even gray page whose level is its number: it survives PNG and resizing."""
    return np.full((height, width, 3), number, np.uint8)


def png(image: np.ndarray) -> bytes:
    """Encode an image without loss."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def know_answers(monkeypatch: pytest.MonkeyPatch, answers: dict[int, str]) -> list[int]:
    """Let the reader answer the page of each number with a text; return the numbers as asked."""
    asked: list[int] = []

    def decode(model, prompts, *, max_new_tokens, on_batch=None, **settings):
        numbers = [int(prompt.images[0][0, 0, 0]) for prompt in prompts]
        asked.extend(numbers)
        if on_batch is not None:
            on_batch(len(prompts))
        return [list(answers[number].encode())[:max_new_tokens] for number in numbers]

    monkeypatch.setattr("inference.reader.greedy_decode", decode)
    return asked
