"""Tars of any members for tests."""

import io
import tarfile
from pathlib import Path
from typing import Any

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
