"""The tiny Qwen2.5-VL: real architecture, byte vocabulary, small enough to learn on a CPU.

    python -m train.modeling.tiny OUT_DIR [--tied]

writes the small files of a model folder (config, tokenizer, chat template, processor), without
weights: a config with `model.init: scratch` trains from them. The weights that this project ships
lie in `models/tiny-base/`, beside these same files.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# Ids 0..255 are the bytes; the specials follow. The three fused headers keep a line's template at
# six tokens without ever matching inside an answer.
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|im_start|>system\n",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
)
VOCAB_SIZE = 272
ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(256, 263)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config(*, hidden: int = 128, layers: int = 3, tied: bool = False) -> dict[str, Any]:
    """Return the flat hub form of the tiny model's config.json (about 1.5 M parameters)."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ENDOFTEXT,
        "eos_token_id": IM_END,
        "pad_token_id": ENDOFTEXT,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.05,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 4096,
        "max_window_layers": layers,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "mrope", "mrope_section": _mrope_section(hidden // 4)},
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
        "vision_config": {
            "depth": layers,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.05,
            "intermediate_size": 2 * hidden,
            "num_heads": 4,
            "in_channels": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [layers - 1],
            "tokens_per_second": 2,
        },
    }


def write_model_files(out: Path, config: dict[str, Any] | None = None) -> None:
    """Write config, tokenizer, chat template and processor settings of a tiny model into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    processor = {
        "min_pixels": 784,
        "max_pixels": 1605632,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.27, 0.27, 0.27],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    generation = {
        "bos_token_id": ENDOFTEXT,
        "eos_token_id": [IM_END, ENDOFTEXT],
        "pad_token_id": ENDOFTEXT,
        "do_sample": False,
    }
    _write_json(out / "config.json", config or tiny_config())
    _write_json(out / "preprocessor_config.json", processor)
    _write_json(out / "tokenizer_config.json", tokenizer)
    _write_json(out / "generation_config.json", generation)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    byte_tokenizer().save(str(out / "tokenizer.json"))


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer in which every UTF-8 byte is the token of its own value."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    # No regular expression: the bytes need no pre-splitting, there is nothing to merge.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer


def _byte_vocabulary() -> dict[str, int]:
    """Map GPT-2's printable stand-in of each byte to the byte (`bytes_to_unicode` of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in stand_ins)
    stand_ins |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return {character: byte for byte, character in stand_ins.items()}


def _mrope_section(head_dim: int) -> list[int]:
    """Give the width axis the low frequencies: at this size it must tell neighbours apart."""
    eighth = max(1, head_dim // 16)
    return [eighth, eighth, head_dim // 2 - 2 * eighth]


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the files of a tiny model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tied", action="store_true", help="share embedding and head, as 3B does")
    arguments = parser.parse_args()
    write_model_files(arguments.out, tiny_config(tied=arguments.tied))


if __name__ == "__main__":
    main()
