"""Tars of any members for tests."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.sample import Sample

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, **options: Any) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def members_of(*samples: Sample) -> Members:
    return [item for sample in samples for item in sample.to_members().items()]


def encode(size: tuple[int, int], kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


PAGE = encode((60, 40))
