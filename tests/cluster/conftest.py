"""One Ray cluster for all tests of this folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# For Ray's own processes and for everything that they start.
_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_memory_monitor_refresh_ms": "0",  # or Ray kills actors when others use the memory
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a fresh cluster, which the test process is connected to."""
    os.environ.update(_ENVIRONMENT)
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    folder = tempfile.mkdtemp(prefix="memshare-", dir="/tmp")  # short: it holds Unix sockets
    ray.init(
        num_cpus=8,  # as bookkeeping; the machine may have fewer
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    address = ray.get_runtime_context().gcs_address
    os.environ["RAY_ADDRESS"] = address
    yield address
    ray.shutdown()
    del os.environ["RAY_ADDRESS"]
    shutil.rmtree(folder, ignore_errors=True)
