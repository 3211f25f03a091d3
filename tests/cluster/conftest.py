"""One Ray cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.bench.local_cluster import local_ray


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a fresh cluster, which the test process is connected to."""
    with local_ray() as address:
        yield address
