"""Shards measured for a model and joined into a catalogue, for commands that only look at them."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from data_tools.errors import ConfigError
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.preprocess import Transform, load_transforms
from data_tools.examples.tasks import Recipe
from data_tools.stream.catalogue import Selection, make_catalogue
from data_tools.stream.fit import PATCHES_PER_VISUAL_TOKEN, Budgets
from data_tools.stream.lengths import fingerprint, make_lengths
from data_tools.stream.source import Source

MIN_PIXELS, MAX_PIXELS = 3136, 1_605_632  # defaults of a stage's configuration


@dataclass(frozen=True)
class Measured:
    """Shards whose lengths are known.

    Attributes:
        shards: paths or URLs.
        folder: of the model, whose tokenizer counts.
        images: page preparation.
        recipe: the questions.
        index_dir: where indexes and lengths lie, if not beside the shards.
    """

    shards: Sequence[str]
    folder: str
    images: ImageSettings
    recipe: Recipe
    index_dir: str | None = None

    def measure(self, num_workers: int) -> None:
        """Make the lengths that are missing, in parallel."""
        make_lengths(
            list(self.shards),
            self.folder,
            self.images,
            self.recipe,
            num_workers=num_workers,
            index_dir=self.index_dir,
        )

    @contextmanager
    def source(self, token_budget: int) -> Iterator[Source]:
        """Open the samples as a source whose packs have a budget; four patches a token.

        Raises:
            DataError: if no sample is usable.
        """
        mark = fingerprint(Encoder.from_folder(self.folder, self.images), self.recipe)
        budgets = Budgets(token_budget, PATCHES_PER_VISUAL_TOKEN * token_budget)
        with tempfile.TemporaryDirectory(prefix="lectern-") as folder:
            path = Path(folder) / "samples.catalogue"
            make_catalogue(
                path,
                list(self.shards),
                mark,
                self.recipe,
                self.images,
                Selection(budgets),
                index_dir=self.index_dir,
            )
            yield Source(str(path))


def parse_transforms(texts: Sequence[str]) -> tuple[Transform, ...]:
    """Return the image transforms of a command line: names, or YAML as in a configuration.

    Raises:
        ConfigError: if one is unknown or has a wrong setting.
    """
    records = []
    for text in texts:
        try:
            record = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--preprocess {text}: no valid YAML ({error})") from error
        records.append({"name": record} if isinstance(record, str) else record)
    try:
        return load_transforms(records)
    except ValidationError as error:
        detail = "; ".join(problem["msg"] for problem in error.errors())
        raise ConfigError(
            f"--preprocess {' '.join(texts)}: {detail}. Write a name, such as line_strip, or YAML, "
            "such as '{name: contrast, low_percentile: 2}'"
        ) from error
