"""Batched greedy decoding of a plain (unhooked) Qwen2.5-VL, exactly as the model continues.

Prompts are sorted by length, padded on the left and decoded by transformers' own `generate`. Under
ZeRO-3 every token would gather the whole model (and unequal lengths would hang): decode a copy of
the weights that no engine has hooked.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from data_tools.examples.encode import Prompt
from train.modeling.pixels import PixelNormalizer, patchify

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

_IMAGE_TYPE = 1  # of `mm_token_type_ids`; 0 is text


class DecodingStoppedError(Exception):
    """Decoding was given up, as asked for."""


class _Stopper:
    """Ends every row of a batch; transformers' StoppingCriteria by its call alone."""

    def __init__(self, must_stop: Callable[[], bool]) -> None:
        self._must_stop = must_stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._must_stop(), device=input_ids.device)


def greedy_decode(
    model: "Qwen2_5_VLForConditionalGeneration",
    prompts: Sequence[Prompt],
    *,
    normalizer: PixelNormalizer,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[int], object] | None = None,
    must_stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """Continue every prompt greedily.

    Args:
        model: on its device, not wrapped by an engine; attention sdpa or flash.
        prompts: any mix of prompts with and without images.
        normalizer: of the model folder's preprocessor settings; moved to the model's device.
        eos_token_id: the token (or tokens) that ends an answer.
        pad_token_id: fills the rows of a batch, masked; any id but that of the image token.
        max_new_tokens: limit of an answer.
        batch_size: prompts decoded together. The texts do not depend on it.
        on_batch: called with the number of prompts of each batch that is done.
        must_stop: asked after every token; True gives up.

    Returns:
        For each prompt, in the input's order, the new ids without the end token. An answer is
        finished if it is shorter than `max_new_tokens`.

    Raises:
        DecodingStoppedError: if `must_stop` said so.
    """
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    greedy = _settings(max_new_tokens, sorted(ends), pad_token_id)
    criteria = None if must_stop is None else [_Stopper(must_stop)]
    normalizer = normalizer.to(model.device)
    answers: list[list[int]] = [[] for _ in prompts]
    with _without_defaults(model):
        for batch in _batches(prompts, batch_size):
            inputs = _inputs([prompts[i] for i in batch], model, normalizer, pad_token_id)
            with torch.inference_mode():
                rows = cast(Any, model).generate(
                    **inputs, generation_config=greedy, stopping_criteria=criteria
                )
            if must_stop is not None and must_stop():
                raise DecodingStoppedError
            start = inputs["input_ids"].shape[1]
            for number, row in zip(batch, rows[:, start:].tolist(), strict=True):
                answers[number] = _until(row, ends)
            if on_batch is not None:
                on_batch(len(batch))
    return answers


@contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode, its folder's generation settings out of the way.

    A hub folder samples by default, with a repetition penalty that damages digits and rules, and
    `generate` fills every gap of ours from there, or warns of what it then ignores.
    """
    from transformers import GenerationConfig

    saved, was_training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = saved
        model.train(was_training)


def _settings(max_new_tokens: int, ends: list[int], pad_token_id: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad_token_id,
        use_cache=True,  # a trained model's config says no
    )


def _batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[int]]:
    """Yield the prompts' numbers, longest first (a batch too large for memory then fails at once).

    Prompts with images and prompts without stay apart: a batch of texts has no pixels to pass.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(
        range(len(prompts)), key=lambda i: (not prompts[i].images, -len(prompts[i].input_ids))
    )
    with_images = [i for i in order if prompts[i].images]
    for numbers in (with_images, order[len(with_images) :]):
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]


def _inputs(
    prompts: list[Prompt], model: Any, normalizer: PixelNormalizer, pad: int
) -> dict[str, Tensor]:
    """Return the arguments of `generate` for one batch, on the model's device."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    ids = np.full((len(prompts), width), pad, np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):  # left padding: all rows end where the answer begins
        ids[row, width - len(prompt.input_ids) :] = prompt.input_ids
        mask[row, width - len(prompt.input_ids) :] = 1
    inputs = {
        "input_ids": torch.from_numpy(ids).to(model.device),
        "attention_mask": torch.from_numpy(mask).to(model.device),
    }
    images = [image for prompt in prompts for image in prompt.images]
    if not images:
        return inputs
    flat = np.concatenate([np.ascontiguousarray(image).reshape(-1) for image in images])
    grid = torch.from_numpy(np.concatenate([prompt.grid_thw for prompt in prompts]))
    # Without the types transformers 5 falls back to one-dimensional positions, silently.
    types = np.where(ids == model.config.image_token_id, _IMAGE_TYPE, 0)
    return inputs | {
        "mm_token_type_ids": torch.from_numpy(types).to(model.device),
        "pixel_values": patchify(torch.from_numpy(flat).to(model.device), grid, normalizer),
        "image_grid_thw": grid.to(model.device),
    }


def _until(row: list[int], ends: set[int]) -> list[int]:
    """Cut a generated row before its first end token."""
    for position, token in enumerate(row):
        if token in ends:
            return row[:position]
    return row
