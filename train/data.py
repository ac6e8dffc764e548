"""The data path of a stage, made of its configuration: encoder, sources, plan, batches."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.examples.augment import Augmentation
from data_tools.examples.characters import CharPrior, CharPriorSettings, count_characters
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.tasks import Conversation, Recipe, ask
from data_tools.stream.collate import ModelLayout
from data_tools.stream.executor import ExampleMaker, Executor
from data_tools.stream.hashing import hash_key
from data_tools.stream.lengths import fingerprint, make_lengths
from data_tools.stream.planner import DataState, Planner
from data_tools.stream.source import Budgets, Source, open_source
from data_tools.templates import load_template
from train.config import Config
from train.ranks import Ranks
from train.shards import Shards


def image_settings(config: Config) -> ImageSettings:
    """Return the page preparation of a stage."""
    return ImageSettings(
        config.data.min_pixels, config.data.max_pixels, tuple(config.data.preprocess)
    )


def recipe_of(config: Config) -> Recipe:
    """Return the questions of a stage."""
    return Recipe(
        tuple(load_template(template.name) for template in config.task.templates),
        tuple(template.weight for template in config.task.templates),
        config.run.seed,
    )


def measure(config: Config, shards: Shards) -> None:
    """Make the lengths that are missing; one process of the job does this, the others wait."""
    make_lengths(
        shards.all,
        config.model.path,
        image_settings(config),
        recipe_of(config),
        num_workers=config.data.index_workers,
    )


@dataclass(frozen=True)
class DataPath:
    """All that is needed to make batches of a stage; `mark` is the plan's fingerprint."""

    config: Config
    encoder: Encoder
    recipe: Recipe
    mark: str
    sources: list[Source]
    validation: Source

    @property
    def num_tokens(self) -> float:
        """Tokens of one epoch, expected over the recipe."""
        return sum(_expected(s.tokens[:, s.usable], self.recipe) for s in self.sources)

    @property
    def num_patches(self) -> float:
        """Vision patches of one epoch."""
        return float(sum(source.patches[source.usable].sum() for source in self.sources))

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(len(source) for source in self.sources)

    def first_state(self) -> DataState:
        """Return the state of an untouched run."""
        zeros = (0,) * len(self.sources)
        return DataState(self.mark, cursors=zeros, used=zeros)

    def epoch(self, state: DataState) -> float:
        """Return how many epochs have been drawn."""
        return sum(state.cursors) / self.num_samples

    def planner(self, state: DataState) -> Planner:
        """Return the plan from a state on."""
        data = self.config.data
        return Planner(
            self.sources,
            self.config.stage.epochs,
            data.token_budget,
            data.patches,
            data.packs_per_step,
            state,
        )

    def executor(self, state: DataState, layout: ModelLayout, ranks: Ranks, pin: bool) -> Executor:
        """Return the batches of a rank from a state on."""
        data = self.config.data
        augment = data.augment
        maker = ExampleMaker(
            self.sources,
            self.encoder,
            layout,
            data.token_budget,
            Augmentation(**augment.model_dump()) if augment else None,
            self.config.run.seed,
        )
        return Executor(
            self.planner(state),
            maker,
            ranks.rank,
            ranks.world_size,
            data.num_workers,
            data.prefetch,
            pin,
        )

    def validation_ids(self) -> list[int]:
        """Return the ids of the validation sample: seeded, the same in every evaluation."""
        usable = self.validation.usable
        draw = np.random.default_rng(hash_key(self.config.run.seed, "validation"))
        count = min(self.config.evaluation.num_samples, len(usable))
        return sorted(int(i) for i in draw.choice(usable, count, replace=False))


def open_data(config: Config, shards: Shards) -> DataPath:
    """Open sources whose lengths have been made (`measure`)."""
    recipe = recipe_of(config)
    encoder = Encoder.from_folder(config.model.path, image_settings(config))
    mark = fingerprint(encoder, recipe)
    budgets = Budgets(config.data.token_budget, config.data.patches)
    sources = [
        open_source(
            part,
            mark,
            recipe,
            budgets,
            max_chars=config.data.max_chars,
            min_chars=config.data.min_chars,
            weight=source.weight,
        )
        for part, source in zip(shards.train, config.data.train, strict=True)
    ]
    validation = open_source(shards.validation, mark, recipe, budgets)
    encoder.prior = fit_prior(config, encoder, recipe, sources)
    plan_mark = plan_fingerprint(config, mark, sources)
    return DataPath(config, encoder, recipe, plan_mark, sources, validation)


def plan_fingerprint(config: Config, lengths_mark: str, sources: list[Source]) -> str:
    """Return a digest of all that the order and content of packs depend on.

    `data.packs_per_step` is not part of it: it may change from one step to the next.
    """
    parts = {
        "lengths": lengths_mark,
        "shards": [[shard.identity for shard in source.shards] for source in sources],
        "weights": [source.weight for source in sources],
        "recipe": [config.run.seed, [template.weight for template in config.task.templates]],
        "budgets": [config.data.token_budget, config.data.patches],
        "selection": [config.data.min_chars, config.data.max_chars],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def fit_prior(
    config: Config, encoder: Encoder, recipe: Recipe, sources: list[Source]
) -> CharPrior | None:
    """Return the character weights with the tables of the training index, or None if they are off.

    Two passes over the labels: how often each character stands there, then the mean token weight.
    """
    section = config.loss.char_prior
    if section is None:
        return None

    def conversations() -> Iterator[tuple[Conversation, float]]:
        """Yield every label of the index with the share in which the recipe asks for it."""
        for source in sources:
            for sample_id in source.usable:
                sample = source.read(int(sample_id))
                for template, share in zip(recipe.templates, recipe.weights, strict=True):
                    yield ask(sample, template), share

    answers = (t.spans for turns, _ in conversations() for t in turns if t.role == "assistant")
    prior = CharPrior(CharPriorSettings(**section.model_dump()), count_characters(answers))
    encoder.prior = prior
    total, count = 0.0, 0.0
    for conversation, share in conversations():
        weights = encoder.answer_weights(conversation)
        total += share * float(weights.sum(dtype=np.float64))
        count += share * len(weights)
    return CharPrior(prior.settings, prior.counts, mean=total / count)


def _expected(tokens: np.ndarray, recipe: Recipe) -> float:
    shares = np.asarray(recipe.weights) / sum(recipe.weights)
    return float(shares @ tokens.sum(axis=1))


def describe(path: DataPath) -> list[str]:
    """Return lines that say what the sources hold, what is left out and how packs come out."""
    data = path.config.data
    lines = []
    for number, source in enumerate(path.sources):
        total = sum(len(shard) for shard in source.shards)
        lines.append(
            f"source {number}: {len(source)} of {total} samples in {len(source.shards)} shards"
        )
        lines += [
            f"  left out, {why}: {n} (first: {key})" for why, (n, key) in source.left_out.items()
        ]
    planner = path.planner(path.first_state())
    steps = [step for _ in range(20) if (step := planner.next_step()) is not None]
    packs = [pack for step in steps for pack in step.packs]
    tokens: list[Any] = [sum(sample.tokens for sample in pack) for pack in packs]
    documents = [len(pack) for pack in packs]
    low, high = np.percentile(documents, [5, 95])
    lines.append(
        f"documents a pack: {np.mean(documents):.1f} (5-95 %: {low:.0f}-{high:.0f}), "
        f"{data.packs_per_step} packs a step, {np.mean(documents) * data.packs_per_step:.0f} "
        "documents a step"
    )
    lines.append(
        f"pack fill: {np.mean(tokens) / data.token_budget:.2%} of {data.token_budget} tokens"
    )
    return lines
