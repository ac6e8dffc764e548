"""The packed forward: equal to single documents and to stock transformers, values and gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_tools.examples.encode import Encoder, Example, ImageSettings
from data_tools.examples.tasks import Span, Turn
from data_tools.stream.collate import collate
from tests.train.tiny import tiny_folder
from train.initial_load import load_model
from train.modeling.attention import choose_attention
from train.modeling.build import pixel_normalizer
from train.modeling.packed import PackedModel, layout_of

ATOL_FP32 = 2e-6  # sums in another order
SHAPES = [[(56, 112)], [(28, 252)], [], [(56, 56), (28, 84), (84, 56)]]  # (height, width) px


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    attention = choose_attention("auto", "cpu", "fp32")
    built = load_model(str(folder), precision="fp32", attention=attention)
    return built.eval()


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    encoder = Encoder.from_folder(folder, ImageSettings(784, 10**6))
    draw = np.random.default_rng(0)
    made = []
    for number, shapes in enumerate(SHAPES):
        pages = tuple(draw.integers(0, 256, (*s, 3)).astype(np.uint8) for s in shapes)
        question = Turn("user", (Span("read" * number),), len(pages))
        answer = Turn("assistant", (Span("an answer "[: 3 + number]),))
        made.append(encoder.example(f"doc-{number}", (question, answer), pages))
    return made


def loss_and_gradients(packed: PackedModel, batches: list[Any]) -> tuple[float, dict]:
    packed.zero_grad()
    total = 0.0
    for batch in batches:
        loss = packed(batch).weighted_sum
        loss.backward()
        total += loss.item()
    grads = {n: p.grad.clone() for n, p in packed.named_parameters() if p.grad is not None}
    return total, grads


def test_packed_documents_equal_documents_alone(
    folder: Path, model: Any, examples: list[Example]
) -> None:
    packed, layout = PackedModel(model, pixel_normalizer(str(folder))), layout_of(model.config)
    together, grads = loss_and_gradients(packed, [collate(examples, layout)])
    apart, grads_apart = loss_and_gradients(packed, [collate([e], layout) for e in examples])
    assert together == pytest.approx(apart, rel=1e-6)
    assert grads.keys() == grads_apart.keys()
    for name in grads:
        assert torch.allclose(grads[name], grads_apart[name], atol=ATOL_FP32, rtol=1e-4), name


def test_order_of_documents_in_a_pack_does_not_matter(
    folder: Path, model: Any, examples: list[Example]
) -> None:
    packed, layout = PackedModel(model, pixel_normalizer(str(folder))), layout_of(model.config)
    one = packed(collate(examples, layout)).weighted_sum
    other = packed(collate(examples[::-1], layout)).weighted_sum
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_packed_loss_equals_stock_transformers(
    folder: Path, model: Any, examples: list[Example]
) -> None:
    packed, layout = PackedModel(model, pixel_normalizer(str(folder))), layout_of(model.config)
    ours = packed(collate(examples, layout)).token_nll
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 784, "longest_edge": 10**6},
        image_mean=[0.5] * 3,
        image_std=[0.27] * 3,
    )
    stock = load_model(
        str(folder), precision="fp32", attention={"text_config": "eager", "vision_config": "eager"}
    ).eval()
    theirs = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids)[None]
        images: dict[str, Any] = {}
        if example.images:
            made = processor(list(example.images), return_tensors="pt")
            images = {name: made[name] for name in ("pixel_values", "image_grid_thw")}
        types = (ids == model.config.image_token_id).int()
        logits = stock(input_ids=ids, mm_token_type_ids=types, **images).logits[0]
        place = torch.from_numpy(example.target_positions)
        theirs.append(
            torch.nn.functional.cross_entropy(logits[place - 1], ids[0, place], reduction="none")
        )
    assert torch.allclose(ours, torch.cat(theirs), atol=1e-5)


def test_weights_scale_each_token(folder: Path, model: Any, examples: list[Example]) -> None:
    packed, layout = PackedModel(model, pixel_normalizer(str(folder))), layout_of(model.config)
    batch = collate(examples, layout)
    weights = torch.rand(batch.weights.shape, generator=torch.Generator().manual_seed(0))
    object.__setattr__(batch, "weights", weights)
    output = packed(batch)
    by_hand = sum(w * n for w, n in zip(weights.tolist(), output.token_nll.tolist(), strict=True))
    assert output.weighted_sum.item() == pytest.approx(by_hand, rel=1e-5)


def test_empty_pack_runs_every_module_and_has_zero_loss_and_gradient(
    folder: Path, model: Any
) -> None:
    packed, layout = PackedModel(model, pixel_normalizer(str(folder))), layout_of(model.config)
    loss, grads = loss_and_gradients(packed, [collate([], layout)])
    assert loss == 0.0
    assert grads.keys() == {name for name, _ in packed.named_parameters()}
    assert all(not gradient.any() for gradient in grads.values())


def test_varlen_attention_gets_document_borders_and_causality(
    folder: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the GPU kernel: one call a layer, equal to the CPU path."""
    import torch.nn.attention.varlen as varlen

    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        calls.append((len(cu_q) - 1, max_q, window_size))
        pieces = []
        for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
            one = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
            pieces.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *one, is_causal=window_size[1] == 0, scale=scale, enable_gqa=enable_gqa
                )[0].transpose(0, 1)
            )
        return torch.cat(pieces)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    choice = choose_attention("varlen", "cuda", "bf16")
    fast = load_model(str(folder), precision="fp32", attention=choice)
    slow = load_model(
        str(folder), precision="fp32", attention=choose_attention("auto", "cpu", "fp32")
    )
    layout, normalizer = layout_of(fast.config), pixel_normalizer(str(folder))
    batch = collate(examples, layout)
    ours = PackedModel(fast.eval(), normalizer)(batch).token_nll
    assert torch.allclose(ours, PackedModel(slow.eval(), normalizer)(batch).token_nll, atol=1e-5)
    assert len(calls) == fast.config.vision_config.depth + fast.config.text_config.num_hidden_layers
    causal = [call for call in calls if call[2] == (-1, 0)]
    assert causal == [(len(examples), batch.max_seqlen, (-1, 0))] * len(causal)
    assert len(causal) == fast.config.text_config.num_hidden_layers
