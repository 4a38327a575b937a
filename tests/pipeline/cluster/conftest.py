"""A Ray cluster that the tests of this folder share: a worker's start takes 3 s, a cluster's 10."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .running import new_cluster


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a cluster of one node with eight cores, as Ray counts them."""
    cluster = new_cluster(num_cpus=8)
    yield cluster.address
    cluster.shutdown()
