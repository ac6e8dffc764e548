"""A large catalogue: its columns are never copied into a rank."""

from pathlib import Path

import pytest

from benchmarks.scale import measure, write_catalogue


@pytest.mark.timeout(120)
def test_the_memory_of_a_rank_does_not_hold_the_columns(tmp_path: Path) -> None:
    path = write_catalogue(tmp_path / "a.catalogue", 10**6)
    assert path.stat().st_size > 60 * 2**20
    assert measure(path, [0, 500_000])["private_mib"] < 20
