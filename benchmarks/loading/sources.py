"""A page set as a source of the plan, measured with the byte tokenizer of the tiny model."""

import time
from pathlib import Path

from benchmarks.loading.contenders import MAX_PIXELS, MIN_PIXELS
from benchmarks.loading.pages import PageSet
from data_tools.examples.encode import Encoder, ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.stream.catalogue import Selection, make_catalogue
from data_tools.stream.fit import PATCHES_PER_VISUAL_TOKEN, Budgets
from data_tools.stream.lengths import fingerprint, make_lengths
from data_tools.stream.source import Source
from data_tools.templates import load_template
from data_tools.views.plans import make_steps
from train.modeling.tiny import write_model_files

TOKEN_BUDGET = 16_384
PACKS_PER_STEP = 64
SAMPLES_PLANNED = 2000


def open_source(pages: PageSet) -> Source:
    """Measure the pages of a set, join them into a catalogue beside its shard and open that."""
    folder = Path(pages.shard).parent / "plan"
    folder.mkdir(exist_ok=True)
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        write_model_files(model)
    images = ImageSettings(MIN_PIXELS, MAX_PIXELS)
    recipe = Recipe((load_template("text-plain"),))
    make_lengths([pages.shard], str(model), images, recipe, num_workers=0)
    mark = fingerprint(Encoder.from_folder(model, images), recipe)
    budgets = Budgets(TOKEN_BUDGET, PATCHES_PER_VISUAL_TOKEN * TOKEN_BUDGET)
    path = folder / "pages.catalogue"
    make_catalogue(path, [pages.shard], mark, recipe, images, Selection(budgets))
    return Source(str(path))


def planning_s_per_sample(source: Source) -> float:
    """Return the CPU seconds that the plan takes for a sample, drawing it included."""
    epochs = -(-SAMPLES_PLANNED // len(source))
    start_s = time.process_time()
    make_steps(source, TOKEN_BUDGET, PACKS_PER_STEP, epochs)
    return (time.process_time() - start_s) / (epochs * len(source))
