"""Conversation and pixels -> token ids, labels and weights; the same code trains and reads.

The text goes through the model folder's own chat template. The prompt is tokenised exactly as at
inference, the answer by itself: at inference the model continues after a finished prompt, so no
token may span the border between them.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.errors import DataError
from data_tools.examples.characters import CharPrior, token_weights
from data_tools.examples.images import (
    FACTOR_PX,
    PATCH_PX,
    PixelMode,
    contiguous,
    num_visual_tokens,
    resize,
    smart_resize,
)
from data_tools.examples.preprocess import Transform, apply_transforms
from data_tools.examples.tasks import Conversation, Span, Turn

IMAGE_PAD = "<|image_pad|>"
END_OF_TURN = "<|im_end|>"
GUARD = "\ufdd0"  # a code point that is no character: marks special tokens that are only text


FULL_SCALE = 1000  # thousandths of a page's side
CONTEXT = 64  # tokens of the answer that a part of it repeats from the part before


@dataclass(frozen=True)
class ImageSettings:
    """How pages are prepared: named transforms, then the resize into the pixel limits.

    Attributes:
        min_pixels: of a resized page.
        max_pixels: of a resized page.
        transforms: applied before the resize.
        mode: of the resize: "exact" gives the pixels of transformers' PIL processor, "fast" those
            of its torchvision one (`data_tools.examples.images.resize`).
    """

    min_pixels: int
    max_pixels: int
    transforms: tuple[Transform, ...] = ()
    mode: PixelMode = "exact"

    def prepare(self, image: np.ndarray, scale: int = FULL_SCALE) -> np.ndarray:
        """Return the (H, W, 3) uint8 image that the model sees; H and W are multiples of 28.

        Args:
            image: (H, W, 3) uint8, as decoded.
            scale: of this image (`resized_size`).
        """
        if self.transforms:
            image = apply_transforms(contiguous(image), self.transforms)
        height, width = image.shape[:2]
        return resize(image, *self.resized_size(height, width, scale), self.mode)

    def resized_size(self, height: int, width: int, scale: int = FULL_SCALE) -> tuple[int, int]:
        """Return the (height, width) px that `smart_resize` gives a transformed image.

        Args:
            height: in pixels.
            width: in pixels.
            scale: below 1000 the pixel limit is that of the normal size, shrunk to this many
                thousandths a side, at least one visual token.
        """
        size = smart_resize(height, width, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        if scale >= FULL_SCALE:
            return size
        limit = max(FACTOR_PX**2, size[0] * size[1] * scale**2 // FULL_SCALE**2)
        return smart_resize(height, width, min_pixels=FACTOR_PX**2, max_pixels=limit)

    @property
    def keeps_size(self) -> bool:
        """Whether an image's resized size follows from its original size alone."""
        return all(transform.keeps_size for transform in self.transforms)


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it answers.

    Attributes:
        input_ids: (S,) int64, image pads expanded to one per visual token.
        images: (H, W, 3) uint8 each, H and W multiples of 28.
    """

    input_ids: np.ndarray
    images: tuple[np.ndarray, ...] = ()

    @property
    def grid_thw(self) -> np.ndarray:
        """(I, 3) int64: frames, patch rows and patch columns of each image."""
        return grid_of(self.images)


@dataclass(frozen=True)
class Example:
    """One conversation, ready for a pack.

    Attributes:
        key: of the sample.
        input_ids: (S,) int64.
        images: (H, W, 3) uint8 each.
        target_positions: (L,) int64, positions in `input_ids` of the tokens to be predicted.
        weights: (L,) float32 loss weight of each of them.
    """

    key: str
    input_ids: np.ndarray
    images: tuple[np.ndarray, ...]
    target_positions: np.ndarray
    weights: np.ndarray

    @property
    def grid_thw(self) -> np.ndarray:
        """(I, 3) int64: frames, patch rows and patch columns of each image."""
        return grid_of(self.images)


def part_of_answer(length: int, window: int, windows: int) -> tuple[int, int]:
    """Return (start, stop): which label tokens of a split answer are those of one part.

    Args:
        length: label tokens of the answer, its end token included.
        window: number of the part, from 0.
        windows: number of parts; they differ by one token at most.
    """
    return -(-window * length // windows), -(-(window + 1) * length // windows)


def grid_of(images: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return (I, 3) int64 grids of (H, W, 3) images."""
    grids = [(1, image.shape[0] // PATCH_PX, image.shape[1] // PATCH_PX) for image in images]
    return np.asarray(grids, np.int64).reshape(-1, 3)


class Encoder:
    """Turns conversations into token ids with the tokenizer and chat template of a model folder."""

    def __init__(self, tokenizer: Any, images: ImageSettings, prior: CharPrior | None = None):
        self.tokenizer = tokenizer
        self.images = images
        self.prior = prior
        self.image_pad_id: int = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self.end_id: int = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        special = sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
        special.sort(key=len, reverse=True)  # "<|im_start|>user" before "<|im_start|>"
        self._special = re.compile("|".join(re.escape(text) for text in special))
        self._guarded = re.compile("|".join(re.escape(_guard(text)) for text in special))
        self._plain_ids = lru_cache(maxsize=4096)(self._tokenize)
        self._plain_render = lru_cache(maxsize=4096)(self._render)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the caches: worker processes start with their own."""
        return Encoder, (self.tokenizer, self.images, self.prior)

    @classmethod
    def from_folder(
        cls, folder: str | Path, images: ImageSettings, prior: CharPrior | None = None
    ) -> "Encoder":
        """Load the tokenizer and chat template of a Hugging Face model folder."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(folder)), images, prior)

    def prompt(self, images: list[np.ndarray], text: str) -> Prompt:
        """Build what the model reads: decoded (H, W, 3) uint8 pages, then the question.

        Args:
            images: decoded and oriented pages, before any transform or resize.
            text: the user's text; may be empty.
        """
        pages = tuple(self.images.prepare(image) for image in images)
        return self.prompt_of((Turn("user", (Span(text),), num_images=len(images)),), pages)

    def prompt_of(self, conversation: Conversation, images: tuple[np.ndarray, ...]) -> Prompt:
        """Build what the model reads before it continues a conversation.

        Args:
            conversation: without the answer that is wanted.
            images: prepared pages (`ImageSettings.prepare`).
        """
        ids, _, _ = self._encode(conversation, is_open=True)
        return Prompt(self._expand(ids, images), images)

    def example(
        self,
        key: str,
        conversation: Conversation,
        images: tuple[np.ndarray, ...],
        window: int = 0,
        windows: int = 1,
    ) -> Example:
        """Build a training example: every answer of the assistant and its end token is a label.

        Args:
            key: of the sample.
            conversation: its turns; the images stand in them in order.
            images: prepared pages (`ImageSettings.prepare`).
            window: which part of the answer is wanted.
            windows: into how many parts the answer is split (`part_of_answer`). Each part has the
                whole prompt before it, and of the answer up to 64 tokens, which are no labels.

        Raises:
            DataError: if the text is unusable, or several answers are to be split.
        """
        ids, targets, weights = self._encode(conversation)
        expanded = self._expand(ids, images)
        # Each image pad grows into one pad a visual token, which moves what follows it.
        pads = np.flatnonzero(ids == self.image_pad_id)
        counts = [num_visual_tokens(*image.shape[:2]) for image in images]
        growth = np.cumsum([0, *(count - 1 for count in counts)])
        moved = targets + growth[np.searchsorted(pads, targets)]
        example = Example(key, expanded, images, moved, weights)
        return example if windows == 1 else _part(example, window, windows)

    def count(self, conversation: Conversation) -> tuple[int, int]:
        """Return (tokens without image pads, label tokens) of a conversation."""
        ids, targets, _ = self._encode(conversation)
        return len(ids) - int((ids == self.image_pad_id).sum()), len(targets)

    def answer_weights(self, conversation: Conversation) -> np.ndarray:
        """Return the (label tokens,) float32 weights of a conversation."""
        return self._encode(conversation)[2]

    def decode(self, ids: list[int] | np.ndarray) -> str:
        """Return the text of generated ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _encode(
        self, conversation: Conversation, is_open: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids (S,) with one pad an image, target positions (L,) and weights (L,).

        Open, the ids go on to where the assistant is to answer; else they end with the last answer.
        """
        whole = self._plain_render(conversation, True) if is_open else self._render(conversation)
        _check_unicode(whole)
        ids: list[int] = []
        targets = [np.zeros(0, np.int64)]
        weights = [np.zeros(0, np.float32)]
        done = 0  # characters of `whole` that are encoded
        for number, turn in enumerate(conversation):
            if turn.role != "assistant":
                continue
            head = self._plain_render(conversation[:number], True)
            if not whole.startswith(head + turn.text + END_OF_TURN):
                raise DataError(
                    "the chat template does not write an answer as it stands followed by "
                    f"{END_OF_TURN}; train from a model folder with a Qwen2.5-VL template"
                )
            ids += self._plain_ids(head[done:])
            answer, offsets = self._tokenize_answer(turn.text)
            targets.append(np.arange(len(ids), len(ids) + len(answer) + 1))
            weights += [token_weights(turn.spans, offsets, self.prior), self._end_weight(turn)]
            ids += [*answer, self.end_id]
            done = len(head) + len(turn.text) + len(END_OF_TURN)
        if is_open:
            ids += self._plain_ids(whole[done:])
        return np.asarray(ids, np.int64), np.concatenate(targets), np.concatenate(weights)

    def _end_weight(self, turn: Turn) -> np.ndarray:
        """Return the (1,) weight of an answer's end token: 0 if nothing of the answer counts."""
        if turn.spans and all(span.weight == 0 for span in turn.spans):
            return np.zeros(1, np.float32)
        return np.asarray([1 / self.prior.mean if self.prior else 1.0], np.float32)

    def _expand(self, ids: np.ndarray, images: tuple[np.ndarray, ...]) -> np.ndarray:
        """Repeat the n-th image pad once a visual token of the n-th image."""
        is_pad = ids == self.image_pad_id
        if is_pad.sum() != len(images):
            raise DataError(f"the text shows {is_pad.sum()} images, {len(images)} were given")
        repeats = np.ones(len(ids), np.int64)
        repeats[is_pad] = [num_visual_tokens(*image.shape[:2]) for image in images]
        return np.repeat(ids, repeats)

    def _render(self, conversation: Conversation, is_open: bool = False) -> str:
        """Write a conversation by the chat template, special tokens in questions guarded."""
        messages = [self._guard_message(turn) for turn in conversation]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_open
        )

    def _guard_message(self, turn: Turn) -> dict:
        message = turn.message
        if turn.role == "assistant":
            return message  # answers are tokenised by themselves

        def guard(text: str) -> str:
            return self._special.sub(lambda match: _guard(match.group()), text)

        if isinstance(message["content"], str):
            return message | {"content": guard(message["content"])}
        parts = [p | {"text": guard(p["text"])} if "text" in p else p for p in message["content"]]
        return message | {"content": parts}

    def _tokenize(self, text: str) -> list[int]:
        """Tokenise template text: special tokens count, except where they are guarded."""
        ids: list[int] = []
        place = 0
        for match in self._guarded.finditer(text):
            ids += self.tokenizer(text[place : match.start()], add_special_tokens=False)[
                "input_ids"
            ]
            ids += self._tokenize_answer(match.group().replace(GUARD, ""))[0]
            place = match.end()
        return ids + self.tokenizer(text[place:], add_special_tokens=False)["input_ids"]

    def _tokenize_answer(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # A document may show "<|im_end|>" in print: in an answer that is text, not a token.
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        return encoded["input_ids"], encoded["offset_mapping"]


def _part(example: Example, window: int, windows: int) -> Example:
    """Return the prompt, some context and one part of an example's only answer."""
    positions = example.target_positions
    first = int(positions[0])
    if int(positions[-1]) - first != len(positions) - 1:
        raise DataError(f'sample "{example.key}": only a single answer can be split')
    start, stop = part_of_answer(len(positions), window, windows)
    context = min(CONTEXT, start)
    ids = example.input_ids
    return Example(
        example.key,
        np.concatenate([ids[:first], ids[first + start - context : first + stop]]),
        example.images,
        np.arange(first + context, first + context + stop - start),
        example.weights[start:stop],
    )


def _guard(special: str) -> str:
    return special[0] + GUARD + special[1:]


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a surrogate pair ({error}); no UTF-8 has it"
        ) from error
