"""Token ids, labels and weights: what trains is what reads."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.errors import DataError
from data_tools.examples.characters import CharPrior, CharPriorSettings
from data_tools.examples.encode import (
    CONTEXT,
    IMAGE_PAD,
    Encoder,
    Example,
    ImageSettings,
    part_of_answer,
)
from data_tools.examples.images import FACTOR_PX
from data_tools.examples.preprocess import Contrast, LineStrip
from data_tools.examples.tasks import Conversation, Span, Turn
from tests.builders import draw_page

ANSWERS = [
    "Total 12.50",
    "发票 龘靐 é 👩‍👩‍👧",
    "\n\n  leading and trailing  \n",
    "",
    "print <|im_end|> <|image_pad|> <|im_start|>user\n <|endoftext|>",
    "\\n \" ' {}",
]
QUESTIONS = ["", "Read the text.", "读出 <|image_pad|> and <|im_end|>", "<|im_start|>assistant\nhi"]


def pages(count: int) -> tuple[np.ndarray, ...]:
    return tuple(draw_page(60 + 40 * i, 90, ["TOTAL"]) for i in range(count))


def prepared(encoder: Encoder, count: int) -> tuple[np.ndarray, ...]:
    return tuple(encoder.images.prepare(page) for page in pages(count))


def exchange(question: str, answer: str, num_images: int = 0) -> Conversation:
    return Turn("user", (Span(question),), num_images), Turn("assistant", (Span(answer),))


def labels_of(encoder: Encoder, example: Example) -> list[str]:
    """Return the decoded label runs, special tokens shown."""
    places = example.target_positions
    cuts = [0, *(np.flatnonzero(np.diff(places) > 1) + 1), len(places)]
    runs = [example.input_ids[places[a:b]] for a, b in pairwise(cuts)]
    return [encoder.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("num_images", [0, 1, 3])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_labels_are_the_answer_and_its_end_and_the_prompt_is_inferences(
    encoder: Encoder, question: str, answer: str, num_images: int
) -> None:
    images = prepared(encoder, num_images)
    example = encoder.example("k", exchange(question, answer, num_images), images)
    assert labels_of(encoder, example) == [answer + "<|im_end|>"]
    assert example.input_ids[-1] == encoder.end_id

    prompt = encoder.prompt(list(pages(num_images)), question)
    first = example.target_positions[0]
    assert example.input_ids[:first].tolist() == prompt.input_ids.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(prompt.images, example.images, strict=True))
    assert np.array_equal(prompt.grid_thw, example.grid_thw)
    assert len(example.weights) == len(example.target_positions)


def test_several_turns_are_all_learned(encoder: Encoder) -> None:
    turns = (
        Turn("system", (Span("be brief <|im_end|>"),)),
        *exchange("first?", "one <|im_end|> <|image_pad|>", 1),
        *exchange("<|image_pad|> second?\n", "\ntwo", 2),
        *exchange("", ""),
    )
    images = prepared(encoder, 3)
    example = encoder.example("k", turns, images)
    assert labels_of(encoder, example) == [
        "one <|im_end|> <|image_pad|><|im_end|>",
        "\ntwo<|im_end|>",
        "<|im_end|>",
    ]
    for number, shown in ((2, 1), (4, 3), (6, 3)):
        prompt = encoder.prompt_of(turns[:number], images[:shown])
        assert example.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
        assert len(prompt.input_ids) in example.target_positions


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_ids_are_those_of_the_chat_template(encoder: Encoder, num_images: int) -> None:
    """The whole text tokenised at once, pads expanded: what every other tool computes."""
    images = prepared(encoder, num_images)
    turns = exchange("Read the text.", "Total 12.50", num_images)
    text = encoder.tokenizer.apply_chat_template([turn.message for turn in turns], tokenize=False)
    for image in images:
        count = image.shape[0] * image.shape[1] // FACTOR_PX**2
        text = text.replace(IMAGE_PAD, "<pad>" * count, 1)
    ids = encoder.tokenizer(text.replace("<pad>", IMAGE_PAD), add_special_tokens=False)["input_ids"]
    example = encoder.example("k", turns, images)
    # The template ends a turn with a line break behind the end token; nothing is learned from it.
    assert encoder.tokenizer.decode(ids[len(example.input_ids) :]) == "\n"
    assert example.input_ids.tolist() == ids[: len(example.input_ids)]


def test_counts_are_those_of_the_example(encoder: Encoder) -> None:
    images = prepared(encoder, 3)
    turns = (*exchange("a <|image_pad|>", "b" * 20, 2), *exchange("c", "<|image_pad|>", 1))
    example = encoder.example("k", turns, images)
    visual = sum(image.shape[0] * image.shape[1] // FACTOR_PX**2 for image in images)
    num_text, num_targets = encoder.count(turns)
    assert num_text + visual == len(example.input_ids)
    assert num_targets == len(example.target_positions)
    assert (example.input_ids == encoder.image_pad_id).sum() == visual


def test_weights_stand_beside_their_labels(byte_encoder: Encoder) -> None:
    spans = (Span("ab"), Span("***", weight=0.0), Span("é"))
    turns = (Turn("user", (Span("q"),), 1), Turn("assistant", spans))
    example = byte_encoder.example("k", turns, prepared(byte_encoder, 1))
    assert example.weights.tolist() == [1, 1, 0, 0, 0, 1, 1, 1]
    weighted = {
        chr(byte): weight
        for byte, weight in zip(
            example.input_ids[example.target_positions], example.weights, strict=True
        )
    }
    assert weighted["*"] == 0 and weighted["a"] == 1


def test_the_end_token_weighs_one_before_the_division_by_the_mean(byte_encoder: Encoder) -> None:
    prior = CharPrior(CharPriorSettings(0, 0), {"a": 1}, mean=2.0)
    encoder = Encoder(byte_encoder.tokenizer, byte_encoder.images, prior)
    assert encoder.answer_weights(exchange("q", "aa")).tolist() == [0.5, 0.5, 0.5]


def test_an_illegible_answer_teaches_nothing_not_even_its_end(byte_encoder: Encoder) -> None:
    prior = CharPrior(CharPriorSettings(0, 0), {"a": 1}, mean=2.0)
    illegible = Turn("assistant", (Span("**", weight=0.0), Span("*", weight=0.0)))
    partly = Turn("assistant", (Span("*", weight=0.0), Span("a")))
    question = Turn("user", (Span("q"),))
    for encoder in (byte_encoder, Encoder(byte_encoder.tokenizer, byte_encoder.images, prior)):
        turns = (question, illegible, question, partly)
        one = 1 / prior.mean if encoder.prior else 1.0
        assert encoder.answer_weights(turns).tolist() == [0, 0, 0, 0, 0, one, one]


def test_images_and_their_places_must_agree(encoder: Encoder) -> None:
    for num_images in (0, 2):
        with pytest.raises(DataError, match=f"shows 1 images, {num_images} were given"):
            encoder.example("k", exchange("q", "a", 1), prepared(encoder, num_images))
    with pytest.raises(DataError, match="shows 0 images, 1 were given"):
        encoder.prompt_of((Turn("user", (Span(IMAGE_PAD),)),), prepared(encoder, 1))


def test_half_a_surrogate_pair_is_a_data_error(encoder: Encoder) -> None:
    for turns in (exchange("q", "a\ud800"), exchange("\udfff", "a")):
        with pytest.raises(DataError, match="half a surrogate pair"):
            encoder.count(turns)


def test_a_template_that_changes_answers_is_refused(byte_encoder: Encoder) -> None:
    encoder = pickle.loads(pickle.dumps(byte_encoder))
    encoder.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
    with pytest.raises(DataError, match="does not write an answer as it stands"):
        encoder.count(exchange("q", " a "))


def test_pages_come_in_multiples_of_28_px_within_the_limits() -> None:
    settings = ImageSettings(3136, 20_000)
    for height, width in [(10, 10), (500, 700), (28, 28), (300, 90)]:
        page = np.zeros((height, width, 3), np.uint8)
        image = settings.prepare(page)
        assert image.shape[0] % FACTOR_PX == image.shape[1] % FACTOR_PX == 0
        assert 3136 <= image.shape[0] * image.shape[1] <= 20_000
        assert image.shape[:2] == settings.resized_size(height, width)
    assert settings.keeps_size
    assert not ImageSettings(784, 20_000, (LineStrip(),)).keeps_size


def test_a_scale_lowers_the_pixel_limit_of_one_page() -> None:
    settings = ImageSettings(3136, 1_000_000)
    assert settings.resized_size(900, 700) == settings.resized_size(900, 700, 1000) == (896, 700)
    areas = []
    for scale in range(1000, 99, -50):
        height, width = settings.resized_size(900, 700, scale)
        assert settings.prepare(np.zeros((900, 700, 3), np.uint8), scale).shape[:2] == (
            height,
            width,
        )
        assert height * width <= max(28 * 28, 896 * 700 * scale**2 // 10**6)
        areas.append(height * width)
    assert areas == sorted(areas, reverse=True) and areas[0] > 50 * areas[-1]
    assert settings.resized_size(900, 700, 1) == (28, 28)
    assert settings.resized_size(20, 20, 600) == (28, 28), "below min_pixels, but never nothing"


def test_transforms_see_three_channels_side_by_side() -> None:
    seen = []

    class Spy(Contrast):
        def __call__(self, image: np.ndarray) -> np.ndarray:
            seen.append(image.flags.c_contiguous)
            return super().__call__(image)

    gray = np.broadcast_to(draw_page(100, 60, ["x"])[:, :, :1], (60, 100, 3))
    ImageSettings(784, 10**6, (Spy(name="contrast"),)).prepare(gray)
    assert seen == [True]


@given(st.integers(1, 3000), st.integers(1, 40))
def test_parts_of_an_answer_cover_it_once(length: int, windows: int) -> None:
    parts = [part_of_answer(length, window, windows) for window in range(windows)]
    assert parts[0][0] == 0 and parts[-1][1] == length
    assert all(one[1] == two[0] for one, two in zip(parts, parts[1:], strict=False))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_split_answer_has_every_label_once_behind_the_whole_prompt(encoder: Encoder) -> None:
    turns = exchange("Read it.", "Total 12.50 发票 " * 40, 2)
    images = prepared(encoder, 2)
    whole = encoder.example("k", turns, images)
    first = int(whole.target_positions[0])
    head, length = whole.input_ids[:first].tolist(), len(whole.target_positions)
    labels, weights = [], []
    for window in range(4):
        part = encoder.example("k", turns, images, window, 4)
        start, stop = part_of_answer(length, window, 4)
        context = min(CONTEXT, start)
        assert part.input_ids[:first].tolist() == head
        before = whole.input_ids[first + start - context : first + start].tolist()
        assert part.input_ids[first : first + context].tolist() == before
        assert len(part.input_ids) == len(head) + context + stop - start
        assert part.target_positions.tolist() == list(range(first + context, len(part.input_ids)))
        assert len(part.images) == 2 and len(part.weights) == len(part.target_positions)
        labels += part.input_ids[part.target_positions].tolist()
        weights += part.weights.tolist()
    assert labels == whole.input_ids[whole.target_positions].tolist()
    assert labels[-1] == encoder.end_id and weights == whole.weights.tolist()


def test_several_answers_are_never_split(encoder: Encoder) -> None:
    turns = exchange("a", "b", 0) + exchange("c", "d", 0)
    with pytest.raises(DataError, match='sample "k": only a single answer can be split'):
        encoder.example("k", turns, (), 0, 2)


def test_transforms_run_before_the_resize() -> None:
    page = draw_page(300, 40, ["TOTAL 12.50"])
    strip = LineStrip()(page)
    assert np.array_equal(ImageSettings(784, 10**6, (LineStrip(),)).prepare(page), strip)


def test_a_pickled_encoder_encodes_the_same(encoder: Encoder) -> None:
    encoder.prompt([], "warm the caches")
    copy = pickle.loads(pickle.dumps(encoder))
    for question in QUESTIONS:
        turns = exchange(question, "Total <|im_end|>", 1)
        images = prepared(encoder, 1)
        one, other = encoder.example("k", turns, images), copy.example("k", turns, images)
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.weights.tolist() == other.weights.tolist()


def test_decode_leaves_special_tokens_out(encoder: Encoder) -> None:
    example = encoder.example("k", exchange("q", "发票 12"), ())
    assert encoder.decode(example.input_ids[example.target_positions]) == "发票 12"
