"""Reader: an exported model folder that turns page images into text, fields and lines.

    reader = Reader.load("RUN/stage2/hf")
    for reading in reader.read_images([image]):
        print(reading.text)

The folder's `lectern.json` says how the model was trained to read: which unit (page or line), which
template, which image transforms and pixel limits. Everything from pixels to token ids is the code
that training uses.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_tools.build import DEFAULT_MARGIN, parse_margin
from data_tools.errors import ConfigError, DataError
from data_tools.examples.encode import Encoder, ImageSettings, Prompt
from data_tools.examples.preprocess import AnyTransform
from data_tools.sample import Box
from data_tools.templates import Template, load_template
from inference.answers import ReadLine, parse_lines
from train.generate import greedy_decode
from train.initial_load import load_model
from train.modeling.attention import decoding_attention
from train.modeling.build import pixel_normalizer
from train.modeling.packed import layout_of
from train.modeling.pixels import PixelNormalizer

SETTINGS_FILE = "lectern.json"
DEFAULT_BATCH_SIZE = 8
DEFAULT_TEMPLATE = "text-en"
MAX_NEW_TOKENS = {"line": 256, "page": 2048}

PageBox = tuple[int, Box]  # number of the page, box in its pixels


class ReaderSettings(BaseModel):
    """How the model of a folder reads: the content of `lectern.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    version: Literal[1] = 1
    unit: Literal["page", "line"] = "page"
    template: str = DEFAULT_TEMPLATE
    preprocess: tuple[AnyTransform, ...] = ()
    min_pixels: int = Field(gt=0)
    max_pixels: int = Field(gt=0)
    pixels: Literal["exact", "fast"] = "exact"


@dataclass(frozen=True)
class Reading:
    """One answer of the model.

    Attributes:
        text: what stands on the image; for a `lines` template the lines' texts, joined by newline.
        token_ids: of the answer, without the end token.
        finished: whether the model ended the answer by itself, within the limit of tokens.
        fields: values by field key; None if the template asks for none or the answer holds none.
        lines: lines with boxes on the original page; None if the template asks for none, or if
            the document has several pages, between which an answer does not distinguish.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool
    fields: dict[str, Any] | None = None
    lines: tuple[ReadLine, ...] | None = None


@dataclass(frozen=True)
class Request:
    """A document that is ready to be read: one prompt, or one a box."""

    template: Template
    prompts: tuple[Prompt, ...]
    page_whs: tuple[tuple[int, int], ...]
    boxes: tuple[PageBox, ...] = ()


class Reader:
    """Reads documents with one exported model; see the module docstring."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        normalizer: PixelNormalizer,
        settings: ReaderSettings,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.settings = settings
        self.batch_size = batch_size
        self.margin_xy = parse_margin(DEFAULT_MARGIN)
        self._normalizer = normalizer
        self._template = load_template(settings.template)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: Literal["bf16", "fp32"] | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> "Reader":
        """Load an exported folder.

        Args:
            folder: written by `python -m train.export`, or any Qwen2.5-VL folder.
            device: None or "auto" takes a GPU if there is one.
            dtype: None takes bf16 on a GPU and fp32 on a CPU.
            batch_size: prompts decoded together; the texts do not depend on it.

        Raises:
            ConfigError: if the folder is no model, is incomplete, or its settings are unknown.
        """
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{folder}: no exported model here (no config.json); export one with "
                "`python -m train.export RUN/stage2`"
            )
        target = _device(device)
        settings = read_settings(path)
        if (path / settings.template).is_file():  # a template of the user's own, exported as well
            settings = settings.model_copy(update={"template": str(path / settings.template)})
        precision = dtype or ("fp32" if target.type == "cpu" else "bf16")
        attention = decoding_attention("auto", target.type, precision)
        model = load_model(str(path), precision=precision, attention=attention)
        images = ImageSettings(
            settings.min_pixels, settings.max_pixels, settings.preprocess, settings.pixels
        )
        encoder = Encoder.from_folder(path, images)
        return cls(
            model.to(target).eval(), encoder, pixel_normalizer(str(path)), settings, batch_size
        )

    @property
    def unit(self) -> Literal["page", "line"]:
        """What one image shows: a page, or a crop of one line."""
        return self.settings.unit

    def template(self, name: str | None = None) -> Template:
        """Return the template of a name or path; None: the one that the model was trained with."""
        return self._template if name is None else load_template(name)

    def read_images(
        self,
        images: Sequence[np.ndarray],
        template: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Reading]:
        """Read each (H, W, 3) uint8 image by itself: a page, or a line for a line reader."""
        requests = [self.prepare([image], template=template) for image in images]
        return [readings[0] for readings in self.answer(requests, max_new_tokens)]

    def read_document(
        self,
        pages: Sequence[np.ndarray],
        boxes: Sequence[PageBox] = (),
        template: str | None = None,
        max_new_tokens: int | None = None,
    ) -> Reading:
        """Read a document of one or several pages.

        Args:
            pages: (H, W, 3) uint8 each, oriented.
            boxes: lines to be read one by one, in reading order; their texts are joined by
                newline. Without boxes the pages are read as a whole.
            template: name or path; None: the model's own.
            max_new_tokens: limit of each answer.

        Raises:
            ConfigError: if a line reader gets no boxes.
            DataError: if a box leaves its page or an image cannot be resized.
        """
        if self.unit == "line" and not boxes:
            raise ConfigError(
                "this model reads lines, and the document has no boxes; give an annotation file "
                "with boxes, or crops of single lines"
            )
        request = self.prepare(pages, boxes, template)
        return join_lines(request, self.answer([request], max_new_tokens)[0])

    def prepare(
        self,
        pages: Sequence[np.ndarray],
        boxes: Sequence[PageBox] = (),
        template: str | None = None,
        question: str | None = None,
    ) -> Request:
        """Build the prompts of a document: one for all pages, or one for each box.

        Args:
            pages: (H, W, 3) uint8 each, oriented.
            boxes: number of the page and box of each line.
            template: name or path; None: the model's own.
            question: text to ask instead of the template's.

        Raises:
            DataError: if a box leaves its page or an image cannot be resized.
        """
        asked = self.template(template)
        text = asked.prompt if question is None else question
        groups = [[self._crop(pages, box)] for box in boxes] if boxes else [list(pages)]
        prompts = tuple(self.encoder.prompt(images, text) for images in groups)
        sizes = tuple((page.shape[1], page.shape[0]) for page in pages)
        return Request(asked, prompts, sizes, tuple(boxes))

    def answer(
        self,
        requests: Sequence[Request],
        max_new_tokens: int | None = None,
        on_batch: Callable[[int], object] | None = None,
    ) -> list[list[Reading]]:
        """Return the reading of every prompt of every request; all are decoded in even batches."""
        prompts = [prompt for request in requests for prompt in request.prompts]
        limit = max_new_tokens or MAX_NEW_TOKENS[self.unit]
        tokenizer = self.encoder.tokenizer
        pad = tokenizer.pad_token_id
        answers = iter(
            greedy_decode(
                self.model,
                prompts,
                normalizer=self._normalizer,
                eos_token_id=self._end_ids(),
                pad_token_id=layout_of(self.model.config).pad_id if pad is None else pad,
                max_new_tokens=limit,
                batch_size=self.batch_size,
                on_batch=on_batch,
            )
        )
        return [
            [self._reading(request, prompt, next(answers), limit) for prompt in request.prompts]
            for request in requests
        ]

    def _reading(self, request: Request, prompt: Prompt, ids: list[int], limit: int) -> Reading:
        text = self.encoder.decode(ids)
        fields, lines = None, None
        if request.template.task == "fields":
            fields = request.template.parse(text) or None
        elif request.template.task == "lines" and len(prompt.images) == 1 and not request.boxes:
            height, width = prompt.images[0].shape[:2]
            lines = tuple(parse_lines(text, (width, height), request.page_whs[0]))
            text = "\n".join(line.text for line in lines)
        return Reading(text, tuple(ids), len(ids) < limit, fields, lines)

    def _crop(self, pages: Sequence[np.ndarray], page_box: PageBox) -> np.ndarray:
        """Cut a line out with the margin that `data_tools.build --unit line` gives it."""
        number, (x1, y1, x2, y2) = page_box
        if not 0 <= number < len(pages):
            raise DataError(f"box {[x1, y1, x2, y2]} is on page {number} of {len(pages)}")
        height, width = pages[number].shape[:2]
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise DataError(
                f"box {[x1, y1, x2, y2]} is empty or leaves the page ({width} x {height} px)"
            )
        across, down = self.margin_xy
        rows = slice(max(0, y1 - down), min(height, y2 + down))
        columns = slice(max(0, x1 - across), min(width, x2 + across))
        return np.ascontiguousarray(pages[number][rows, columns])

    def _end_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        more = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return sorted({self.encoder.end_id, *more})


def join_lines(request: Request, readings: Sequence[Reading]) -> Reading:
    """Return one reading of a document from those of its prompts (one without boxes)."""
    if not request.boxes:
        return readings[0]
    lines = tuple(
        ReadLine(box, reading.text, page)
        for (page, box), reading in zip(request.boxes, readings, strict=True)
    )
    return Reading(
        text="\n".join(line.text for line in lines),
        token_ids=tuple(token for reading in readings for token in reading.token_ids),
        finished=all(reading.finished for reading in readings),
        lines=lines,
    )


def read_settings(folder: Path) -> ReaderSettings:
    """Return the reader settings of a model folder.

    Without `lectern.json` (a folder of the hub) the pixel limits are those of
    `preprocessor_config.json`, pages are read, and the question is that of `text-en`.

    Raises:
        ConfigError: if the file is damaged or of another version, or there are no pixel limits.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        path = folder / "preprocessor_config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if path.name != SETTINGS_FILE:
            size = record.get("size") or {}
            record = {
                "min_pixels": record.get("min_pixels", size.get("shortest_edge")),
                "max_pixels": record.get("max_pixels", size.get("longest_edge")),
            }
        return ReaderSettings.model_validate(record)
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, ValidationError):
            parts = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            error = ValueError("; ".join(parts))
        raise ConfigError(
            f"{path}: not the settings of a reader ({error}); export the model again with this "
            "release"
        ) from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; use --device cpu or auto")
    return chosen
