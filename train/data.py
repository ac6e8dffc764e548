"""The data path of a stage, made of its configuration: encoder, sources, plan, batches."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data_tools.errors import DataError
from data_tools.examples.augment import Augmentation
from data_tools.examples.characters import CharPrior, CharPriorSettings, count_characters
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.tasks import Conversation, Recipe, ask
from data_tools.stream.collate import ModelLayout
from data_tools.stream.executor import ExampleMaker, Executor
from data_tools.stream.hashing import hash_key
from data_tools.stream.lengths import fingerprint, make_lengths
from data_tools.stream.planner import DataState, Pack, Planner
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


CHARACTERS_FILE = "characters.json"
PACKS_LOOKED_AT = 400


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
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(len(source) for source in self.sources)

    def first_packs(self) -> list[Pack]:
        """Return the packs that the plan starts with, enough to know how they come out."""
        planner = self.planner(self.first_state())
        packs: list[Pack] = []
        while len(packs) < PACKS_LOOKED_AT and (step := planner.next_step()) is not None:
            packs += step.packs
        return packs

    def samples_per_pack(self) -> float:
        """Return the mean number of samples of the first packs."""
        packs = self.first_packs()
        return sum(len(pack) for pack in packs) / len(packs)

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
        source = self.validation
        usable = source.usable[source.answerable[0, source.usable]]
        draw = np.random.default_rng(hash_key(self.config.run.seed, "validation"))
        if not len(usable):
            raise DataError(
                "data.validation: no sample has an answer for "
                f"{self.recipe.templates[0].name}, the first of task.templates, which is asked"
            )
        count = min(self.config.evaluation.num_samples, len(usable))
        return sorted(int(i) for i in draw.choice(usable, count, replace=False))


def open_data(config: Config, shards: Shards) -> DataPath:
    """Open sources whose lengths (`measure`) and character tables (`fit_prior`) have been made."""
    encoder, recipe, mark, sources = _open_sources(config, shards)
    encoder.prior = _read_prior(config)
    budgets = Budgets(config.data.token_budget, config.data.patches)
    validation = open_source(shards.validation, mark, recipe, budgets)
    plan_mark = plan_fingerprint(config, mark, sources)
    return DataPath(config, encoder, recipe, plan_mark, sources, validation)


def _open_sources(config: Config, shards: Shards) -> tuple[Encoder, Recipe, str, list[Source]]:
    recipe = recipe_of(config)
    encoder = Encoder.from_folder(config.model.path, image_settings(config))
    mark = fingerprint(encoder, recipe)
    sources = [
        open_source(
            part,
            mark,
            recipe,
            Budgets(config.data.token_budget, config.data.patches),
            max_chars=config.data.max_chars,
            min_chars=config.data.min_chars,
            weight=source.weight,
        )
        for part, source in zip(shards.train, config.data.train, strict=True)
    ]
    return encoder, recipe, mark, sources


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
        "augment": config.model_dump(mode="json")["data"]["augment"],
        "loss": config.loss.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def fit_prior(config: Config, shards: Shards) -> None:
    """Make the character tables of the training index, if they are wanted and not there yet.

    Two passes over the labels: how often each character stands there, then the mean token weight.
    One process of the job does this; `open_data` reads what it wrote into the stage's folder.
    """
    section = config.loss.char_prior
    if section is None:
        return
    encoder, recipe, mark, sources = _open_sources(config, shards)
    digest = plan_fingerprint(config, mark, sources)
    path = config.folder / CHARACTERS_FILE
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["fingerprint"] == digest:
        return
    total = 2 * sum(len(source) for source in sources)
    bar = tqdm(total=total, desc="counting characters", unit="sample", disable=None)

    def conversations() -> Iterator[tuple[Conversation, float]]:
        """Yield every label of the index with the share in which the recipe asks for it."""
        for source in sources:
            for sample_id, shares in zip(source.usable, source.shares.T, strict=True):
                bar.update(1)
                sample = source.read(int(sample_id))
                for template, share in zip(recipe.templates, shares, strict=True):
                    if share > 0:
                        yield ask(sample, template), float(share)

    answers = (t.spans for turns, _ in conversations() for t in turns if t.role == "assistant")
    counts = count_characters(answers)
    encoder.prior = CharPrior(CharPriorSettings(**section.model_dump()), counts)
    total_weight, num_labels = 0.0, 0.0
    for conversation, share in conversations():
        weights = encoder.answer_weights(conversation)
        total_weight += share * float(weights.sum(dtype=np.float64))
        num_labels += share * len(weights)
    bar.close()
    record = {"fingerprint": digest, "mean": total_weight / num_labels, "counts": counts}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def _read_prior(config: Config) -> CharPrior | None:
    section = config.loss.char_prior
    if section is None:
        return None
    record = json.loads((config.folder / CHARACTERS_FILE).read_text(encoding="utf-8"))
    settings = CharPriorSettings(**section.model_dump())
    return CharPrior(settings, record["counts"], record["mean"])


def describe(path: DataPath) -> list[str]:
    """Return lines that say what the sources hold, what is left out and how packs come out."""
    data = path.config.data
    lines = []
    for name, source in [*((f"source {k}", s) for k, s in enumerate(path.sources)),
                         ("validation", path.validation)]:  # fmt: skip
        total = sum(len(shard) for shard in source.shards)
        lines.append(f"{name}: {len(source)} of {total} samples in {len(source.shards)} shards")
        for why, (count, key) in source.left_out.items():
            lines.append(f"  left out, {why}: {count} (first: {key})")
    packs = path.first_packs()
    low, high = np.percentile([len(pack) for pack in packs], [5, 95])
    tokens = np.mean([sum(sample.tokens for sample in pack) for pack in packs])
    mean = path.samples_per_pack()
    lines.append(
        f"documents a pack: {mean:.1f} (5-95 %: {low:.0f}-{high:.0f}), "
        f"{data.packs_per_step} packs a step, {mean * data.packs_per_step:.0f} documents a step"
    )
    lines.append(f"pack fill: {tokens / data.token_budget:.2%} of {data.token_budget} tokens")
    return lines
