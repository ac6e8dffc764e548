"""Catalogues of small shards for tests: measured, joined, opened."""

import dataclasses
from pathlib import Path
from typing import Any

from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.stream.catalogue import Selection, make_catalogue
from data_tools.stream.fit import Budgets
from data_tools.stream.lengths import fingerprint, make_lengths
from data_tools.stream.source import Source


def make_source(
    path: Path,
    shards: list[str],
    model: Path,
    images: ImageSettings,
    recipe: Recipe,
    budgets: Budgets,
    *,
    weight: float = 1.0,
    next_epoch: int | None = None,
    **selection: Any,
) -> Source:
    """Return the source of some shards; its catalogue is made at `path`."""
    make_lengths(shards, str(model), images, recipe, num_workers=0)
    mark = fingerprint(Encoder.from_folder(model, images), recipe)
    chosen = dataclasses.replace(Selection(budgets), **selection)
    make_catalogue(path, shards, mark, recipe, images, chosen, next_epoch=next_epoch)
    return Source(str(path), weight)
