"""A second copy of every checkpoint behind a URL (s3://, gs://, another file system).

Each rank uploads its own shard; the manifest goes last, so a folder without one is no checkpoint.

    python -m train.checkpoint fetch s3://bucket/run/stage2 runs/invoices/stage2
"""

import logging
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from data_tools.errors import CheckpointError
from train.checkpoint.manifest import MANIFEST_FILE, fsync_folder, read_manifest, verify
from train.checkpoint.retention import Retention

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Mirror:
    """The mirror of one stage's checkpoints."""

    url: str

    def put_shard(self, places: Sequence[Path], checkpoint: str) -> None:
        """Upload one file of a checkpoint that is not finished yet.

        Args:
            places: where the file may lie: its folder may be given its final name meanwhile.
            checkpoint: its final name.

        Raises:
            CheckpointError: if the storage refuses it.
        """
        problem = None
        for path in places:
            try:
                self._put(path, f"{checkpoint}/{path.name}")
                return
            except FileNotFoundError as error:  # of the file, or of the bucket
                problem = error
        if any(path.exists() for path in places):
            raise CheckpointError(f"{self.url} cannot be written ({problem})")
        raise CheckpointError(f"{places[-1]} is gone before it was copied to {self.url}")

    def finish(self, checkpoint: Path, retention: Retention, step: int) -> None:
        """Upload the manifest of a checkpoint whose shards are there, and delete old copies."""
        self._put(checkpoint / MANIFEST_FILE, f"{checkpoint.name}/{MANIFEST_FILE}")
        filesystem, root = self._open()
        for number in retention.surplus(self.steps(), step):
            folder = f"{root}/step-{number:08d}"
            filesystem.rm(f"{folder}/{MANIFEST_FILE}")  # first: without it it is no checkpoint
            filesystem.rm(folder, recursive=True)

    def steps(self) -> list[int]:
        """Return the steps of every finished checkpoint of the mirror, ascending."""
        filesystem, root = self._open()
        found = filesystem.glob(f"{root}/step-*/{MANIFEST_FILE}")
        matches = (_STEP.fullmatch(str(path).split("/")[-2]) for path in found)
        return sorted(int(match[1]) for match in matches if match)

    def fetch(self, folder: Path, step: int | None = None) -> Path:
        """Copy a checkpoint (default: the newest) into a folder of checkpoints.

        Returns:
            The checkpoint; one that is there already and whole is kept.

        Raises:
            CheckpointError: if the mirror has none, or what arrives is damaged.
        """
        steps = self.steps()
        number = step if step is not None else (steps or [-1])[-1]
        if number not in steps:
            raise CheckpointError(f"{self.url}: no checkpoint of step {step}; there are: {steps}")
        final = folder / f"step-{number:08d}"
        if final.exists() and not verify(final):
            return final
        temporary = folder / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        filesystem, root = self._open()
        try:
            filesystem.get(f"{root}/{final.name}/{MANIFEST_FILE}", str(temporary / MANIFEST_FILE))
            for shard in read_manifest(temporary).shards:
                filesystem.get(f"{root}/{final.name}/{shard.file}", str(temporary / shard.file))
                logger.info("%s fetched", shard.file)
            if problems := verify(temporary):
                raise CheckpointError("; ".join(problems))
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            fsync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return final

    def _put(self, path: Path, name: str) -> None:
        filesystem, root = self._open()
        try:
            filesystem.makedirs(f"{root}/{name.rsplit('/', 1)[0]}", exist_ok=True)
            filesystem.put_file(str(path), f"{root}/{name}")
        except FileNotFoundError:
            raise
        except Exception as error:  # each storage client has errors of its own
            raise CheckpointError(f"{self.url}/{name} cannot be written ({error})") from error

    def _open(self) -> tuple[Any, str]:
        filesystem, root = fsspec.core.url_to_fs(self.url)
        return filesystem, str(root).rstrip("/")
