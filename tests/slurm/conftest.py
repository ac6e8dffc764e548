"""Clusters of two nodes, one a test module, healthy and empty at the start of every test."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, slurm_missing
from tests.slurm.machines import namespaces_missing

CLUSTERS = ("cluster", "gpu_cluster", "netns_cluster")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes without GPUs that share this machine's network."""
    yield from _bring_up(tmp_path_factory)


@pytest.fixture(scope="module")
def gpu_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two fake GPUs each."""
    yield from _bring_up(tmp_path_factory, gpus=2)


@pytest.fixture(scope="module")
def netns_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with networks of their own: their cables can be pulled, their names resolve."""
    if reason := slurm_missing() or namespaces_missing():
        pytest.skip(reason)
    yield from _bring_up(tmp_path_factory, mode="netns")


def _bring_up(tmp_path_factory: pytest.TempPathFactory, **options: Any) -> Iterator[Cluster]:
    if reason := slurm_missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("c"), **options) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _restored(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cancel what a test leaves in the queue and switch on what it switched off."""
    clusters = [request.getfixturevalue(n) for n in CLUSTERS if n in request.fixturenames]
    yield
    for cluster in clusters:
        cluster.restore()
