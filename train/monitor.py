"""What a run shows while it runs: TensorBoard, a progress bar or log lines, and the run's files.

Everything that other programs need to know of a run is read from these files. They are written by
rank 0; on resume they are cut at the resumed step, so that no step is told twice. A full disk costs
what would have been written, not the run.
"""

import errno
import json
import logging
import math
import os
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data_tools.stream.planner import Step
from train.status import read_status, write_json

logger = logging.getLogger(__name__)

STATE_EVERY_STEPS = 1000  # data.jsonl holds the whole data state this often
CAPTION_PX = 22
MIN_CAPTION_WIDTH_PX = 320
MAX_CAPTION_ROWS = 8


class Monitor:
    """Writes the files of RUN/stageN; does nothing on other ranks than 0.

    Args:
        folder: RUN/stageN.
        is_main: whether this is rank 0.
        start_step: the resumed step; what the files tell of later ones is cut.
        total_steps: of the stage.
        check_owner: raises where another start has taken the folder over; called before writing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        start_step: int,
        total_steps: int,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._is_main, self._total = folder, is_main, total_steps
        self._check_owner = check_owner
        self._status: dict[str, Any] = {}
        self._is_disk_told = False
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        for name in ("log.jsonl", "data.jsonl", "faults.jsonl"):
            cut_after(folder / name, start_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc=folder.name,
            unit="step",
            disable=not sys.stderr.isatty(),
        )
        before = read_status(folder)
        restarts = before.get("restarts", -1) + 1
        if before.get("metrics_step", math.inf) <= start_step:
            self._status = {k: before[k] for k in ("metrics", "metrics_step") if k in before}
        self.status(state="running", step=start_step, restarts=restarts, host=socket.gethostname())

    def step(self, step: int, planned: Step, holes: list[dict]) -> None:
        """Record one finished step's plan, its holes and, now and then, the data state."""
        if not self._is_main:
            return
        self._check_owner()
        record: dict[str, Any] = {
            "step": step,
            "plan_hash": planned.plan_hash,
            "packs": len(planned.packs),
            "holes": len(holes),
        }
        if step % STATE_EVERY_STEPS == 0:
            record["state"] = planned.state.to_json()
        with self._spared():
            self._append("data.jsonl", record)
        for hole in holes:
            with self._spared():
                self._append("faults.jsonl", {"step": step} | hole)
                text = f"**{hole['key']}** ({hole['kind']}): {hole['reason']}"
                self._board.add_text("data/holes", text, step)
            logger.warning("step %d: left out %s", step, hole["reason"])
        self._bar.update(1)

    def scalars(self, step: int, values: dict[str, float], line: str) -> None:
        """Write values to TensorBoard and log.jsonl, and one line for people."""
        if not self._is_main:
            return
        self._check_owner()
        with self._spared():
            self._append("log.jsonl", {"step": step, "time": round(time.time(), 3)} | values)
        with self._spared():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._say(line)

    def pages(self, step: int, pages: list[tuple[str, np.ndarray, str, str]]) -> None:
        """Show pages with what was read and what is true: (key, (H, W, 3) image, read, true)."""
        if not self._is_main:
            return
        for number, (key, image, prediction, truth) in enumerate(pages):
            picture = caption(image, [f"read: {prediction}", f"true: {truth}"])
            text = f"**{key}**\n\nread:\n\n    {_block(prediction)}\n\ntrue:\n\n    {_block(truth)}"
            with self._spared():
                self._board.add_image(f"validation/{number}", picture, step, dataformats="HWC")
                self._board.add_text(f"validation/{number}", text, step)
        with self._spared():
            self._board.flush()

    def status(self, **changes: Any) -> None:
        """Replace status.json atomically, with some of its values changed."""
        if not self._is_main:
            return
        self._check_owner()
        self._status |= changes | {"total_steps": self._total, "time": round(time.time(), 3)}
        with self._spared():
            write_json(self._folder / "status.json", self._status)

    def close(self) -> None:
        """Flush everything."""
        if self._is_main:
            self._bar.close()
            with self._spared():
                self._board.close()

    def _say(self, line: str) -> None:
        if self._bar.disable:
            logger.info(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        data = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
        with open(self._folder / name, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(data) != len(data):  # the next line would continue half of this one
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Let training go on where the folder cannot be written to; told once."""
        try:
            yield
        except OSError as error:
            if not self._is_disk_told:
                logger.error(
                    "%s cannot be written (%s): training goes on, with gaps in its log and status",
                    self._folder,
                    error,
                )
            self._is_disk_told = True


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file that belong to later steps, and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break  # the run was killed while it wrote this line
        if record["step"] <= step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def caption(image: np.ndarray, lines: list[str]) -> np.ndarray:
    """Return the image with wrapped lines of text below it, (H', W', 3) uint8."""
    font = ImageFont.load_default(CAPTION_PX - 6)
    width = max(image.shape[1], MIN_CAPTION_WIDTH_PX)
    columns = width * 2 // CAPTION_PX  # a character is about half as wide as its row is high
    texts: list[str] = []
    for line in lines:
        texts += textwrap.wrap(line.replace("\n", " / "), columns)[:MAX_CAPTION_ROWS]
    page = Image.new("RGB", (width, image.shape[0] + CAPTION_PX * len(texts)), "white")
    page.paste(Image.fromarray(image), (0, 0))
    for number, text in enumerate(texts):
        y = image.shape[0] + CAPTION_PX * number
        ImageDraw.Draw(page).text((4, y), text, fill="black", font=font)
    return np.asarray(page)


def start_logging(rank: int) -> None:
    """Let rank 0 speak; every other rank may only complain, with its number."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {prefix}%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for name in ("deepspeed", "DeepSpeed", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _block(text: str) -> str:
    return text.replace("\n", "\n    ")
