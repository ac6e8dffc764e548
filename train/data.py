"""The data path of a stage, made of its configuration: encoder, sources, plan, batches.

One process of the job prepares (`prepare`: lengths, catalogues, character tables, the plan), the
others wait; then every process opens what it wrote (`open_data`).
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL
from tqdm import tqdm

from data_tools.errors import DataError
from data_tools.examples.augment import Augmentation
from data_tools.examples.characters import CharPrior, CharPriorSettings, count_characters
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.tasks import Conversation, Recipe, ask
from data_tools.stream.catalogue import Selection, make_catalogue
from data_tools.stream.collate import ModelLayout
from data_tools.stream.executor import ExampleMaker, Executor
from data_tools.stream.fit import Budgets
from data_tools.stream.hashing import hash_key
from data_tools.stream.lengths import fingerprint, make_lengths
from data_tools.stream.plan import DATA_FOLDER, Plan, digests
from data_tools.stream.planner import DataState, Pack, Planner
from data_tools.stream.ranges import RangeReader, StorageSettings
from data_tools.stream.source import Source
from data_tools.templates import load_template
from train.config import Config
from train.ranks import Ranks
from train.shards import Shards

CHARACTERS_FILE = "characters.json"
PACKS_LOOKED_AT = 400
MANY_PATCH_BOUND = 0.5  # of the packs
GIB = 2**30


def image_settings(config: Config) -> ImageSettings:
    """Return the page preparation of a stage."""
    data = config.data
    return ImageSettings(data.min_pixels, data.max_pixels, tuple(data.preprocess), data.pixels)


def recipe_of(config: Config) -> Recipe:
    """Return the questions of a stage."""
    return Recipe(
        tuple(load_template(template.name) for template in config.task.templates),
        tuple(template.weight for template in config.task.templates),
        config.run.seed,
    )


def storage_settings(config: Config) -> StorageSettings:
    """Return how shards are read."""
    storage = config.data.storage
    return StorageSettings(
        tries=storage.tries,
        deadline_s=storage.deadline_s,
        request_timeout_s=storage.request_timeout_s,
        hedge_after_s=storage.hedge_after_s,
        cache_dir=storage.cache_dir,
        cache_bytes=int(storage.cache_gb * GIB),
    )


def prepare(config: Config, shards: Shards, saved: DataState | None = None) -> None:
    """Make what is missing: indexes, lengths, catalogues, character tables.

    Args:
        config: of the stage.
        shards: of the stage.
        saved: where the data of an interrupted run stands; new shards join at its next epoch.

    Raises:
        DataError: if the data is not usable, or shards of the interrupted run are gone.
        CheckpointError: if the interrupted run had other data settings.
    """
    images, recipe = image_settings(config), recipe_of(config)
    data = config.data
    mark = fingerprint(Encoder.from_folder(config.model.path, images), recipe)
    plan = make_plan(config, mark)
    if saved is not None:
        plan.check_settings(saved)  # before the run's catalogues are made anew with others
    make_lengths(
        shards.all,
        config.model.path,
        images,
        recipe,
        num_workers=data.index_workers,
        index_dir=data.index_dir,
    )
    budgets = Budgets(data.token_budget, data.patches)
    everything = Selection(budgets, too_long=tuple(data.too_long))
    selection = replace(
        everything,
        min_chars=data.min_chars,
        max_chars=data.max_chars,
        max_damaged_share=data.max_hole_share,
    )
    for number, part in enumerate(shards.train):
        path = config.folder / plan.catalogues[number]
        make_catalogue(
            path,
            part,
            mark,
            recipe,
            images,
            selection,
            next_epoch=_next_epoch(str(path), saved.cursors[number]) if saved else None,
            index_dir=data.index_dir,
        )
    make_catalogue(
        _validation_path(config),
        shards.validation,
        mark,
        recipe,
        images,
        everything,
        index_dir=data.index_dir,
    )
    fit_prior(config, plan)


def make_plan(config: Config, lengths_mark: str) -> Plan:
    """Return the plan of a stage; every setting that the content of a step depends on is in it.

    `data.packs_per_step` is in no digest: it may change from one step to the next.
    """
    data = config.data
    record = config.model_dump(mode="json")
    settings = {
        "tokenizer, templates, page size and transforms": lengths_mark,
        "run.seed": config.run.seed,
        "task.templates": [template.weight for template in config.task.templates],
        "data.train (weights)": [source.weight for source in data.train],
        "data.token_budget, patch_budget": [data.token_budget, data.patches],
        "data.min_chars, max_chars": [data.min_chars, data.max_chars],
        "data.too_long": data.too_long,
        "data.pixels, version of Pillow": [data.pixels, PIL.__version__],
        "data.augment": record["data"]["augment"],
        "loss": record["loss"],
    }
    return Plan(
        settings=digests(settings),
        catalogues=tuple(f"{DATA_FOLDER}/train-{k}.catalogue" for k in range(len(data.train))),
        weights=tuple(source.weight for source in data.train),
        epochs=tuple(source.epochs or config.stage.epochs for source in data.train),
        token_budget=data.token_budget,
        patch_budget=data.patches,
        packs_per_step=data.packs_per_step,
    )


@dataclass(frozen=True)
class DataPath:
    """All that is needed to make batches of a stage."""

    config: Config
    encoder: Encoder
    plan: Plan
    sources: list[Source]
    validation: Source

    @property
    def num_samples(self) -> int:
        """Samples that are seen in all epochs, divided by the epochs."""
        draws = (s.num_draws(n) for s, n in zip(self.sources, self.plan.epochs, strict=True))
        return round(sum(draws) / self.config.stage.epochs)

    def first_packs(self) -> tuple[list[Pack], Planner]:
        """Return the packs that the plan starts with, enough to know how they come out."""
        planner = self.plan.planner(self.sources, self.first_state())
        packs: list[Pack] = []
        while len(packs) < PACKS_LOOKED_AT and (step := planner.next_step()) is not None:
            packs += step.packs
        return packs, planner

    def samples_per_pack(self) -> float:
        """Return the mean number of samples of the first packs."""
        packs, _ = self.first_packs()
        return sum(len(pack) for pack in packs) / len(packs)

    def first_state(self) -> DataState:
        """Return the state of an untouched run."""
        return self.plan.first_state(self.sources)

    def epoch(self, state: DataState) -> float:
        """Return how many epochs have been seen; what waits to be packed has not."""
        return max(0, sum(state.cursors) - len(state.window)) / self.num_samples

    def maker(self, sources: list[Source], layout: ModelLayout, augment: bool) -> ExampleMaker:
        """Return what makes batches of the packs of some sources."""
        data = self.config.data
        settings = data.augment if augment else None
        return ExampleMaker(
            sources,
            self.encoder,
            layout,
            data.token_budget,
            Augmentation(**settings.model_dump()) if settings else None,
            self.config.run.seed,
            storage_settings(self.config),
        )

    def executor(self, state: DataState, layout: ModelLayout, ranks: Ranks, pin: bool) -> Executor:
        """Return the batches of a rank from a state on."""
        data = self.config.data
        return Executor(
            self.plan.planner(self.sources, state),
            self.maker(self.sources, layout, augment=True),
            ranks.rank,
            ranks.world_size,
            num_workers=data.num_workers,
            max_bytes=int(data.queue_gb * GIB),
            pin=pin,
            timeout_s=data.worker_timeout_s,
        )

    def validation_ids(self) -> list[int]:
        """Return the ids of the validation sample: seeded, the same in every evaluation."""
        source = self.validation
        usable = source.used[source.answerable[0, source.used]]
        draw = np.random.default_rng(hash_key(self.config.run.seed, "validation"))
        if not len(usable):
            raise DataError(
                "data.validation: no sample has an answer for "
                f"{source.recipe.templates[0].name}, the first of task.templates, which is asked"
            )
        count = min(self.config.evaluation.num_samples, len(usable))
        return sorted(int(i) for i in draw.choice(usable, count, replace=False))


def open_data(config: Config) -> DataPath:
    """Open what `prepare` has made."""
    encoder = Encoder.from_folder(config.model.path, image_settings(config))
    encoder.prior = _read_prior(config)
    plan = make_plan(config, fingerprint(encoder, recipe_of(config)))
    validation = Source(str(_validation_path(config)))
    return DataPath(config, encoder, plan, plan.open_sources(config.folder), validation)


def _validation_path(config: Config) -> Path:
    return config.folder / DATA_FOLDER / "validation.catalogue"


def _next_epoch(catalogue: str, cursor: int) -> int:
    """Return the first epoch that has not begun at a cursor."""
    if not os.path.exists(catalogue):
        return 0
    epoch, position = Source(catalogue).epoch_of(cursor)
    return epoch if position == 0 else epoch + 1


def fit_prior(config: Config, plan: Plan) -> None:
    """Make the character tables of the training data, if they are wanted and not there yet.

    Two passes over the labels: how often each character stands there, then the mean token weight.
    One process of the job does this; `open_data` reads what it wrote into the stage's folder.
    """
    section = config.loss.char_prior
    if section is None:
        return
    sources = plan.open_sources(config.folder)
    # Shards that join later do not move the weights of a run: they are not counted.
    identity = [plan.settings, [source.generations[0].digest for source in sources]]
    path = config.folder / CHARACTERS_FILE
    if path.exists() and json.loads(path.read_text(encoding="utf-8"))["made_of"] == identity:
        return
    encoder = Encoder.from_folder(config.model.path, image_settings(config))
    reader = RangeReader(storage_settings(config))
    total = 2 * sum(len(source.begun_with) for source in sources)
    bar = tqdm(total=total, desc="counting characters", unit="sample", disable=None)

    def conversations() -> Iterator[tuple[Conversation, float]]:
        """Yield every label of the data with the share in which the recipe asks for it."""
        for source in sources:
            for sample_id in source.begun_with.tolist():
                bar.update(1)
                sample = source.read_record(sample_id, reader)
                for template, share in zip(
                    source.recipe.templates, source.shares(sample_id), strict=True
                ):
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
    record = {"made_of": identity, "mean": total_weight / num_labels, "counts": counts}
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


def describe(path: DataPath, world_size: int) -> list[str]:
    """Return lines that say what the sources hold, what is left out and how packs come out."""
    data = path.config.data
    lines: list[str] = []
    for number, source in enumerate(path.sources):
        lines += _describe_source(f"source {number}", source)
    lines += _describe_source("validation", path.validation)
    packs, planner = path.first_packs()
    low, high = np.percentile([len(pack) for pack in packs], [5, 95])
    tokens = np.mean([sum(sample.tokens for sample in pack) for pack in packs])
    mean = path.samples_per_pack()
    lines.append(
        f"documents a pack: {mean:.1f} (5-95 %: {low:.0f}-{high:.0f}), "
        f"{data.packs_per_step} packs a step, {mean * data.packs_per_step:.0f} documents a step"
    )
    lines.append(f"pack fill: {tokens / data.token_budget:.2%} of {data.token_budget} tokens")
    bound = planner.num_patch_bound / planner.num_packs
    if bound > MANY_PATCH_BOUND:
        lines.append(
            f"  data.patch_budget = {data.patches} decides {bound:.0%} of the packs, which are "
            "less full for it; raise it if the vision encoder's memory allows"
        )
    empty = -data.packs_per_step % world_size
    if empty:
        lines.append(
            f"  {world_size} ranks do not divide data.packs_per_step = {data.packs_per_step}: "
            f"{empty} of {data.packs_per_step + empty} pack places a step stay empty"
        )
    return lines


def _describe_source(name: str, source: Source) -> list[str]:
    lines = [
        f"{name}: {len(source)} of {source.num_samples} samples in {len(source.shards)} shards"
    ]
    for generation in source.generations[1:]:
        lines.append(f"  {generation.num_shards} shards from epoch {generation.first_epoch} on")
    for why, (count, example) in source.left_out.items():
        lines.append(f"  left out, {why}: {count} (first: {example})")
    for shard in source.shards:
        if shard.damage:
            lines.append(f"  {shard.url}: {shard.damage}")
    shrunk, split = source.num_fitted
    if shrunk or split:
        lines.append(f"  longer than a pack: {shrunk} with smaller pages, {split} in several parts")
    count, key = source.duplicates
    if count:
        lines.append(f"  {count} samples share their key with another one (first: {key})")
    return lines
