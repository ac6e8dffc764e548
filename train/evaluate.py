"""Evaluation during training: teacher-forced held-out loss, and reading by greedy decoding.

Under ZeRO-3 decoding in place would gather the model once a token, and ranks with answers of
different lengths would wait for each other. So the weights are gathered once, parameter by
parameter, into an unhooked copy on every rank; each rank reads its share of the sample.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from data_tools.errors import ConfigError, DataError
from data_tools.examples.encode import Encoder, Prompt
from data_tools.examples.images import decode
from data_tools.examples.tasks import ask
from data_tools.sample import Sample
from data_tools.stream.collate import ModelLayout
from data_tools.stream.planner import DataState, Planner
from data_tools.stream.ranges import RangeReader
from train.collectives import gather_json
from train.config import Config
from train.data import DataPath, storage_settings
from train.engine import plain_copy
from train.generate import DecodingStoppedError, greedy_decode
from train.metrics import FieldReport, NormalizeOptions, TextReport, field_report, text_report
from train.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadSample:
    """One sample of the validation set as the model read it."""

    key: str
    group: str
    prediction: str
    truth: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class ValidationResult:
    """What an evaluation found.

    Attributes:
        loss: teacher-forced cross-entropy per label token, in nats, without character weights.
        text: text metrics over the validation sample.
        fields: field metrics where the template asks for fields.
        samples: in the order of the sample; the same on every rank.
        images: key -> (H, W, 3) uint8 as the model saw it, of the samples that this rank read.
    """

    loss: float
    text: TextReport
    fields: FieldReport | None
    samples: list[ReadSample]
    images: dict[str, np.ndarray]

    def scalars(self) -> dict[str, float]:
        """Return the headline figures by their TensorBoard names."""
        values = {
            "validation/loss": self.loss,
            "validation/cer": self.text.cer.micro.value,
            "validation/wer": self.text.wer.micro.value,
            "validation/character_accuracy": self.text.character_accuracy,
            "validation/exact_match": self.text.exact_match.value,
        }
        if self.fields is not None:
            values["validation/field_f1"] = self.fields.f1.value
            values["validation/e2e_accuracy"] = self.fields.e2e_accuracy.value
        return values


class Evaluator:
    """Evaluates the engine's weights on a fixed sample of the validation shards.

    Every method is a collective: all ranks call it, in the same order.
    """

    def __init__(
        self, config: Config, data: DataPath, layout: ModelLayout, ranks: Ranks, device: Any
    ) -> None:
        self._config, self._data, self._layout = config, data, layout
        self._ranks, self._device = ranks, device
        self._reader = RangeReader(storage_settings(config))
        self._template = data.validation.recipe.templates[0]
        # Losses stay comparable between runs with and without character weights.
        self._encoder = Encoder(data.encoder.tokenizer, data.encoder.images)
        self._ids = data.validation_ids()
        self._copy: Any = None

    def run(
        self, engine: Any, must_stop: Callable[[], bool] | None = None
    ) -> ValidationResult | None:
        """Compute the held-out loss and read the sample.

        Args:
            engine: whose weights are evaluated.
            must_stop: True on any rank gives up; the result is then None on all of them.
        """
        loss = self.loss(engine)
        reading = self._read(engine, must_stop)
        if reading is None:
            return None
        samples, images = reading
        if not samples:
            raise ConfigError(
                "data.validation: none of the evaluated samples can be read and has a legible "
                "answer; raise evaluation.num_samples or look at the shards"
            )
        groups = [sample.group for sample in samples]
        options = NormalizeOptions(casefold=self._config.evaluation.casefold)
        predictions = [sample.prediction for sample in samples]
        text = text_report([s.truth for s in samples], predictions, groups=groups, options=options)
        fields = None
        if self._template.task == "fields":
            found = [self._template.parse(prediction) or None for prediction in predictions]
            fields = field_report(
                [s.fields for s in samples], found, groups=groups, options=options
            )
        return ValidationResult(loss, text, fields, samples, images)

    def loss(self, engine: Any) -> float:
        """Return the teacher-forced loss on the sample, per unit of weight."""
        data, world_size = self._config.data, self._ranks.world_size
        source = self._data.validation.restricted_to(self._ids)
        maker = self._data.maker([source], self._layout, augment=False)
        maker = dataclasses.replace(maker, encoder=self._encoder)
        state = DataState.first({}, [source.digest])
        planner = Planner([source], [1], data.token_budget, data.patches, world_size, state)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        engine.eval()
        with torch.no_grad():
            while (step := planner.next_step()) is not None:
                for packs in step.assign(world_size):
                    pack = packs[self._ranks.rank]
                    batch = maker.build(pack, maker.fetch(pack))
                    for hole in batch.holes:
                        logger.warning("validation: left out %s", hole["reason"])
                    output = engine(batch.to(self._device))
                    sums[0] += output.weighted_sum.double()
                    sums[1] += batch.weight_sum
        engine.train()
        dist.all_reduce(sums)
        return float(sums[0] / sums[1].clamp(min=1))

    def _read(
        self, engine: Any, must_stop: Callable[[], bool] | None
    ) -> tuple[list[ReadSample], dict[str, np.ndarray]] | None:
        model = self._gather_copy(engine)
        mine = self._ids[self._ranks.rank :: self._ranks.world_size]
        cases = [case for case in map(self._case, mine) if case is not None]
        parts = gather_json(self._answers(model, engine.module.normalizer, cases, must_stop))
        if None in parts:
            return None
        longest = max(len(part) for part in parts)
        merged = [part[i] for i in range(longest) for part in parts if i < len(part)]
        images = {case.key: prompt.images[0] for case, prompt in cases if prompt.images}
        return [ReadSample(**record) for record in merged], images

    def _answers(
        self,
        model: Any,
        normalizer: Any,
        cases: list[tuple[ReadSample, Prompt]],
        must_stop: Callable[[], bool] | None,
    ) -> list[dict[str, Any]] | None:
        """Return the records of the samples with what the model reads; None if it must stop."""
        config = self._config.evaluation
        try:
            answers = greedy_decode(
                model,
                [prompt for _, prompt in cases],
                normalizer=normalizer,
                eos_token_id=self._encoder.end_id,
                pad_token_id=self._layout.pad_id,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
                must_stop=must_stop,
            )
        except DecodingStoppedError:
            return None
        return [
            dataclasses.asdict(dataclasses.replace(case, prediction=self._encoder.decode(ids)))
            for (case, _), ids in zip(cases, answers, strict=True)
        ]

    def _case(self, sample_id: int) -> tuple[ReadSample, Prompt] | None:
        """Return a sample and its prompt; None where it cannot be decoded or its truth be read."""
        try:
            sample = self._data.validation.read(sample_id, self._reader)
            pages = [decode(data, f'sample "{sample.key}"') for data in sample.image_bytes]
            prepared = tuple(self._encoder.images.prepare(page) for page in pages)
            sizes = [(image.shape[1], image.shape[0]) for image in prepared]
            conversation = ask(sample, self._template, sizes)
            prompt = self._encoder.prompt_of(conversation[:-1], prepared)
        except DataError as error:
            logger.warning("validation: left out %s", error)
            return None
        answer = conversation[-1]
        if all(span.weight == 0 for span in answer.spans):
            return None
        return self._unread(sample, answer.text), prompt

    def _unread(self, sample: Sample, truth: str) -> ReadSample:
        keys = [field.key for field in self._template.fields]
        group = str(sample.tags.get("document", sample.key))
        fields = {key: sample.fields.get(key) for key in keys}
        return ReadSample(sample.key, group, "", truth, fields)

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
