"""Evaluation during training: teacher-forced held-out loss, and reading by greedy decoding.

Under ZeRO-3 decoding in place would gather the model once a token, and ranks with answers of
different lengths would wait for each other. So the weights are gathered once, parameter by
parameter, into an unhooked copy on every rank; each rank reads its share of the sample.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from data_tools.examples.encode import Prompt
from data_tools.examples.images import decode
from data_tools.examples.tasks import ask
from data_tools.stream.collate import ModelLayout
from data_tools.stream.executor import ExampleMaker
from data_tools.stream.planner import DataState, Planner
from train.config import Config
from train.data import DataPath
from train.engine import plain_copy
from train.generate import greedy_decode
from train.metrics import NormalizeOptions, TextReport, text_report
from train.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """One sample of the validation set as the model read it."""

    key: str
    prediction: str
    truth: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: teacher-forced loss per unit of weight, in nats.
        report: text metrics over the validation sample.
        readings: in the order of the sample; the same on every rank.
        images: key -> (H, W, 3) uint8 as the model saw it, for this rank's first samples.
    """

    loss: float
    report: TextReport
    readings: list[Reading]
    images: dict[str, np.ndarray]


class Evaluator:
    """Evaluates the engine's weights on a fixed sample of the validation shards.

    Every method is a collective: all ranks call it, in the same order.
    """

    def __init__(
        self, config: Config, data: DataPath, layout: ModelLayout, ranks: Ranks, device: Any
    ) -> None:
        self._config, self._data, self._layout = config, data, layout
        self._ranks, self._device = ranks, device
        self._ids = data.validation_ids()
        self._copy: Any = None

    def run(self, engine: Any) -> Evaluation:
        """Compute the held-out loss and read the sample."""
        loss = self.loss(engine)
        readings, images = self._read(engine)
        options = NormalizeOptions(casefold=self._config.evaluation.casefold)
        report = text_report(
            [r.truth for r in readings], [r.prediction for r in readings], options=options
        )
        return Evaluation(loss, report, readings, images)

    def loss(self, engine: Any) -> float:
        """Return the teacher-forced loss on the sample, per unit of weight."""
        data, config = self._data, self._config
        source = dataclasses.replace(data.validation, usable=np.asarray(self._ids))
        maker = ExampleMaker([source], data.encoder, self._layout, config.data.token_budget)
        planner = Planner(
            [source],
            1,
            config.data.token_budget,
            config.data.patches,
            self._ranks.world_size,
            DataState(data.mark),
        )
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        engine.eval()
        with torch.no_grad():
            while (step := planner.next_step()) is not None:
                for packs in step.assign(self._ranks.world_size):
                    batch = maker.batch(packs[self._ranks.rank])
                    output = engine(batch.to(self._device))
                    sums[0] += output.weighted_sum.double()
                    sums[1] += batch.weight_sum
        engine.train()
        dist.all_reduce(sums)
        return float(sums[0] / sums[1].clamp(min=1))

    def _read(self, engine: Any) -> tuple[list[Reading], dict[str, np.ndarray]]:
        model = self._gather_copy(engine)
        mine = self._ids[self._ranks.rank :: self._ranks.world_size]
        cases = [case for case in map(self._case, mine) if case is not None]
        config = self._config.evaluation
        answers = greedy_decode(
            model,
            [prompt for _, prompt, _ in cases],
            normalizer=engine.module.normalizer,
            eos_token_id=self._data.encoder.end_id,
            pad_token_id=self._layout.pad_id,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
        texts = [self._data.encoder.decode(ids) for ids in answers]
        own = [[key, text, truth] for (key, _, truth), text in zip(cases, texts, strict=True)]
        parts = gather_json(own, self._device)
        longest = max(len(part) for part in parts)
        merged = [part[i] for i in range(longest) for part in parts if i < len(part)]
        images = {key: prompt.images[0] for key, prompt, _ in cases if prompt.images}
        return [Reading(*row) for row in merged], images

    def _case(self, sample_id: int) -> tuple[str, Prompt, str] | None:
        """Return (key, prompt, true answer) of a sample; None where the truth is illegible."""
        sample = self._data.validation.read(sample_id)
        encoder, template = self._data.encoder, self._data.recipe.templates[0]
        pages = [decode(data, f'sample "{sample.key}"') for data in sample.image_bytes]
        prepared = tuple(encoder.images.prepare(page) for page in pages)
        sizes = [(image.shape[1], image.shape[0]) for image in prepared]
        conversation = ask(sample, template, sizes)
        answer = conversation[-1]
        if all(span.weight == 0 for span in answer.spans):
            return None
        return sample.key, encoder.prompt_of(conversation[:-1], prepared), answer.text

    def _gather_copy(self, engine: Any) -> Any:
        """Bring the engine's current weights into the copy, one parameter at a time."""
        original = dict(engine.module.model.named_parameters())
        if self._copy is None:
            self._copy = plain_copy(self._config, self._device)
            size = sum(p.numel() * p.element_size() for p in self._copy.parameters())
            if self._ranks.is_main:
                logger.info("evaluation keeps a copy of the weights: %.2f GB a rank", size / 1e9)
        with torch.no_grad():
            for name, target in self._copy.named_parameters():
                with deepspeed.zero.GatheredParameters([original[name]]):
                    target.copy_(original[name])
        return self._copy


def gather_json(value: Any, device: Any) -> list[Any]:
    """Return every rank's JSON value, by rank; a collective without pickle."""
    world_size = dist.get_world_size()
    data = torch.tensor(list(json.dumps(value).encode("utf-8")), dtype=torch.uint8, device=device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return [
        json.loads(bytes(part[: int(size)].cpu().numpy()))
        for part, size in zip(parts, sizes, strict=True)
    ]
