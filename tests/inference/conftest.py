"""One exported page reader and one line reader for all tests of this folder."""

import pytest

from tests.inference.oracle import export_tiny


@pytest.fixture(scope="session")
def page_folder(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("page-reader"))


@pytest.fixture(scope="session")
def line_folder(tmp_path_factory):
    return export_tiny(
        tmp_path_factory.mktemp("line-reader"),
        unit="line",
        template="text-plain",
        preprocess=[{"name": "line_strip", "stretch": 2.0}],
    )
