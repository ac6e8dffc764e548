"""Greedy decoding: equal to a plain loop, whatever the batch, order and generation settings."""

import warnings

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from data_tools.examples.encode import Prompt
from train.generate import greedy_decode
from train.modeling.pixels import PixelNormalizer, patchify
from train.modeling.tiny import ENDOFTEXT, IM_END, IMAGE_PAD, VISION_END, VISION_START, tiny_config

NORMALIZER = PixelNormalizer([0.5, 0.5, 0.5], [0.27, 0.27, 0.27])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(**tiny_config(hidden=64, layers=2))
    built = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    built.lm_head.weight.data.mul_(4)  # clear winners, so that ties never decide
    return built.eval()


def make_prompt(seed, sizes, num_text):
    """Random text after images of `sizes` (height, width) px."""
    generator = np.random.default_rng(seed)
    images = tuple(generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes)
    ids = []
    for height, width in sizes:
        ids += [VISION_START, *[IMAGE_PAD] * (height * width // 784), VISION_END]
    return Prompt(np.array([*ids, *generator.integers(97, 123, num_text)], np.int64), images)


PROMPTS = [
    make_prompt(0, [(28, 84)], 3),
    make_prompt(1, [(56, 140)], 9),
    make_prompt(2, [], 5),
    make_prompt(3, [(28, 28), (84, 56)], 2),
    make_prompt(4, [], 12),
    make_prompt(5, [(140, 140)], 4),
]


def decode(model, prompts, batch_size, **changes):
    settings = {"eos_token_id": IM_END, "pad_token_id": ENDOFTEXT, "max_new_tokens": 12} | changes
    return greedy_decode(model, prompts, normalizer=NORMALIZER, batch_size=batch_size, **settings)


def plain_loop(model, prompt, steps):
    """Slow reference: the whole sequence again for each token, no cache, no padding."""
    ids = torch.from_numpy(prompt.input_ids)[None]
    images = {}
    if prompt.images:
        grid = torch.from_numpy(prompt.grid_thw)
        flat = np.concatenate([image.reshape(-1) for image in prompt.images])
        images = {
            "pixel_values": patchify(torch.from_numpy(flat), grid, NORMALIZER),
            "image_grid_thw": grid,
        }
    for _ in range(steps):
        with torch.no_grad():
            types = (ids == IMAGE_PAD).long()
            positions, _ = model.model.get_rope_index(
                ids, mm_token_type_ids=types, image_grid_thw=images.get("image_grid_thw")
            )
            logits = model(
                input_ids=ids,
                position_ids=positions,
                mm_token_type_ids=types,
                use_cache=False,
                **images,
            ).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt.input_ids) :].tolist()


def test_decoding_equals_a_plain_loop_without_cache_or_padding(model):
    expected = [plain_loop(model, prompt, 6) for prompt in PROMPTS]
    assert decode(model, PROMPTS, 4, max_new_tokens=6, eos_token_id=IM_END) == expected
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)  # the images matter


def test_text_does_not_depend_on_batch_size_or_order(model):
    single = decode(model, PROMPTS, 1)
    assert decode(model, PROMPTS, 4) == single
    assert decode(model, PROMPTS[::-1], 3) == single[::-1]


def test_answers_end_before_the_first_end_token(model):
    full = decode(model, PROMPTS[:2], 2)
    end = full[0][3]
    cut = decode(model, PROMPTS[:2], 2, eos_token_id=[IM_END, end])
    for whole, answer in zip(full, cut, strict=True):
        assert answer == (whole[: whole.index(end)] if end in whole else whole)


def test_sampling_settings_of_the_hub_folder_neither_act_nor_warn(model, caplog):
    plain = decode(model, PROMPTS, 4)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_p = True, 1e-6, 0.001
    config.repetition_penalty = 5.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(model, PROMPTS, 4) == plain
    assert not caplog.records
    assert model.generation_config is config


def test_training_mode_and_progress_are_the_callers(model):
    model.train()
    done = []
    decode(model, PROMPTS, 3, on_batch=done.append)
    assert model.training
    assert done == [3, 1, 2]
    model.eval()


def test_nothing_to_decode_and_a_senseless_batch_size(model):
    assert decode(model, [], 4) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        decode(model, PROMPTS, 0)
