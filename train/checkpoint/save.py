"""Save checkpoints of a ZeRO engine: training waits for a copy in memory, not for a disk.

    saver = CheckpointSaver(engine, RUN/stageN/checkpoints, SaveSettings(keep_last=2))
    saver.save(step, state)        # a collective; returns when the copy is made
    saver.close()                  # waits until the last one is durable

One save is under way at a time (two with a local disk in between): the next one waits for it, and
says so. A save that fails leaves nothing behind and deletes nothing; training goes on unless
`on_error` is "stop". The last one of a run must hold.
"""

import json
import logging
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from data_tools.errors import EXIT_DEFECT, CheckpointError
from train.checkpoint import zero_state
from train.checkpoint.agree import together
from train.checkpoint.manifest import Manifest, step_folder_name, verify
from train.checkpoint.mirror import Mirror
from train.checkpoint.retention import Retention, delete
from train.checkpoint.snapshot import HostCopy
from train.checkpoint.write import Destination, nearby_prefix, write_rank
from train.collectives import gather_json, rank_and_world

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "deepspeed", "transformers")
ASK_EVERY_S = 30.0  # well below the time that a collective may take


@dataclass(frozen=True)
class SaveSettings:
    """How checkpoints are saved.

    Attributes:
        keep_last: how many of the newest remain; 0 keeps all.
        keep_every: and every step that is a multiple of this.
        in_background: False waits for the disk before training goes on.
        local_dir: folder of each node's own disk that shards are written to first.
        mirror: URL of a second copy.
        on_error: what a failed save, or a failed second copy, does: "warn" or "stop".
        timeout_s: how long rank 0 waits for the files of the other ranks.
    """

    keep_last: int = 2
    keep_every: int | None = None
    in_background: bool = True
    local_dir: str | None = None
    mirror: str | None = None
    on_error: Literal["warn", "stop"] = "warn"
    timeout_s: float = 1800.0


@dataclass(frozen=True)
class _Running:
    """A save that is under way on this rank."""

    step: int
    name: str
    future: "Future[str | None]"
    is_copied: threading.Event


class CheckpointSaver:
    """Saves the checkpoints of one engine into one folder, one after the other.

    Args:
        engine: a DeepSpeed ZeRO engine; `engine.module.model` is the model.
        folder: the checkpoints of the stage, on a file system that all ranks share.
        settings: how.
        base: where the frozen weights, which are not stored, come from.
        extra: further JSON for the record.
        check_owner: raises where another start has taken the run over: then nothing is published.

    Attributes:
        blocked_s: how long training waited for the last save.
    """

    def __init__(
        self,
        engine: Any,
        folder: Path,
        settings: SaveSettings,
        *,
        base: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._folder, self._settings = engine, folder, settings
        self._base, self._extra, self._check_owner = base, extra or {}, check_owner
        self._copy = HostCopy()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")
        self._running: deque[_Running] = deque()
        self._is_closed = False
        self._last_step: int | None = None
        self._lost: str | None = None  # why the last save failed
        self.blocked_s = 0.0
        if settings.local_dir:  # what a killed process has left there
            for leftover in Path(settings.local_dir).glob(f"{nearby_prefix(folder)}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, state: dict[str, Any], *, best_step: int | None = None) -> None:
        """Begin to write `folder/step-XXXXXXXX`; a collective of all ranks between two steps.

        Args:
            step: optimizer steps done. A checkpoint of it that is there and whole is kept.
            state: JSON of the trainer; `load_checkpoint` returns it.
            best_step: a step that is not deleted.

        Raises:
            CheckpointError: on every rank, if this or an earlier save failed and `on_error` is
                "stop".
        """
        started = time.perf_counter()
        self._make_room()
        self._last_step, self._lost = step, None
        try:
            self._begin(step, state, best_step)
        except CheckpointError as error:
            self._report_lost(step, str(error))
        if not self._settings.in_background:
            self.wait()
        self.blocked_s = time.perf_counter() - started

    def wait(self) -> None:
        """Wait until every save that is under way is durable; a collective of all ranks.

        Raises:
            CheckpointError: on every rank, if one failed and `on_error` is "stop".
        """
        while self._running:
            self._wait_for(self._running.popleft())

    def _make_room(self) -> None:
        """Wait until the memory of the last snapshot is free, and hardly anything is under way."""
        allowed = 1 if self._settings.local_dir else 0
        while len(self._running) > allowed:
            self._wait_for(self._running.popleft())
        if self._running:
            self._running[-1].is_copied.wait()

    def _wait_for(self, running: _Running) -> None:
        if not running.future.done() and rank_and_world()[0] == 0:
            logger.info("waiting for the checkpoint of step %d", running.step)
        # In short collectives: a rank that is done would else wait in one for as long as the
        # slowest disk takes, and the group would give up.
        while not all(gather_json(running.future.done())):
            wait([running.future], timeout=ASK_EVERY_S)
        error = running.future.exception()
        lost = None if error is None else str(error)
        parts = gather_json([lost, running.future.result() if error is None else None])
        lost_parts, copy_parts = (
            list(dict.fromkeys(filter(None, p))) for p in zip(*parts, strict=True)
        )
        if lost_parts:
            self._report_lost(running.step, "; ".join(lost_parts))
        elif copy_parts:
            self._report("; ".join(copy_parts))

    def close(self, *, must_hold: bool = True) -> None:
        """Wait for the last save and end the thread; typed twice it does nothing.

        Raises:
            CheckpointError: on every rank, if the last save failed and must hold.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.wait()
        finally:
            self._threads.shutdown(wait=False)
        if must_hold and self._lost is not None:
            lost = CheckpointError(self._lost)
            lost.exit_code = EXIT_DEFECT  # of a disk or a network: a job tries again, a few times
            raise lost

    def _begin(self, step: int, state: dict[str, Any], best_step: int | None) -> None:
        rank, _ = rank_and_world()
        final = self._folder / step_folder_name(step)
        doing = f"Saving {final}"
        busy = {running.name for running in self._running}
        name = gather_json(together(lambda: self._prepare(final, busy), doing))[0]
        if name is None:
            return
        try:
            snapshot = together(lambda: self._copy.take(self._engine), doing)
            manifest = together(lambda: self._manifest(step, state), doing)
        except CheckpointError:
            if rank == 0:
                shutil.rmtree(self._folder / name, ignore_errors=True)
            raise
        destination = self._destination(name, final, best_step)
        is_copied = threading.Event()
        before = self._running[-1].future if self._running else None
        future = self._threads.submit(
            write_rank, snapshot, manifest, rank, destination, is_copied, before
        )
        self._running.append(_Running(step, name, future, is_copied))

    def _prepare(self, final: Path, busy: Collection[str]) -> str | None:
        if rank_and_world()[0] != 0:
            return None
        self._check_owner()
        return prepare(final, busy)

    def _manifest(self, step: int, state: dict[str, Any]) -> Manifest:
        """Return the manifest without its shards."""
        manifest = Manifest(
            step=step,
            world_size=rank_and_world()[1],
            shards=[],
            groups=zero_state.group_settings(self._engine),
            optimizer_steps=zero_state.optimizer_steps(self._engine),
            counters={name: int(getattr(self._engine, name)) for name in zero_state.COUNTERS},
            state=state,
            parameters=zero_state.describe_parameters(self._engine),
            base=self._base,
            extra=self._extra,
            versions={name: version(name) for name in LIBRARIES},
        )
        json.dumps([manifest.state, manifest.base, manifest.extra])  # TypeError: here, not later
        return manifest

    def _destination(self, name: str, final: Path, best_step: int | None) -> Destination:
        settings = self._settings
        return Destination(
            temporary=self._folder / name,
            final=final,
            local=Path(settings.local_dir) if settings.local_dir else None,
            mirror=Mirror(settings.mirror) if settings.mirror else None,
            retention=Retention(settings.keep_last, settings.keep_every, best_step),
            timeout_s=settings.timeout_s,
            check_owner=self._check_owner,
        )

    def _report_lost(self, step: int, problem: str) -> None:
        if step == self._last_step:
            self._lost = problem
        self._report(f"{problem} The checkpoint of step {step} is missing.")

    def _report(self, problem: str) -> None:
        if self._settings.on_error == "stop":
            raise CheckpointError(problem)
        if rank_and_world()[0] == 0:
            logger.error("%s Training goes on (checkpoint.on_error: warn).", problem)


def prepare(final: Path, busy: Collection[str] = ()) -> str | None:
    """Return the name of a new temporary folder, or None if the checkpoint is there and whole.

    Args:
        final: folder of the checkpoint.
        busy: temporary folders that are still written to; all others are deleted.
    """
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        if leftover.name not in busy:
            shutil.rmtree(leftover, ignore_errors=True)
    if final.exists():
        problems = verify(final)
        if not problems:
            logger.warning("%s exists already and is whole: kept as it is", final)
            return None
        logger.warning("%s is replaced: %s", final, "; ".join(problems))
        delete(final)
    temporary = folder / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary.name
