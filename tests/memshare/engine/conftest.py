"""Real vLLM engines in this process, so that tests can look at scheduler and worker.

Models: ``tiny`` (milliseconds a step) where bookkeeping is tested, ``tiny_with_weights`` where
outputs must mean something, and in ``make test-complete`` also the real SmolLM2. Engines start
once and are shared by a module.
"""

from __future__ import annotations

import os

# Before libraries are imported, which read these once. Servers may inherit them.
os.environ.update(OMP_NUM_THREADS="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memshare.small_model.names import resolve_model
from tests.memshare.engine.harness import (
    Engine,
    StartEngine,
    inspect_models_here,
    write_tiny_model,
    write_tiny_weights,
)

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}


@pytest.fixture(scope="package", autouse=True)
def environment() -> Iterator[None]:
    """Engines run in this process. Servers that other tests start must not inherit that."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        inspect_models_here(patch)
        yield


@pytest.fixture(scope="session")
def start_engine() -> StartEngine:
    """Start an engine as a context; it is gone, with its workers, at the end."""

    @contextmanager
    def start(
        model: str, memshare: dict[str, Any] | None = None, **options: Any
    ) -> Iterator[Engine]:
        from vllm.distributed import cleanup_dist_env_and_memory

        engine = Engine(model, memshare, **options)
        try:
            yield engine
        finally:
            engine.close()
            del engine
            cleanup_dist_env_and_memory()

    return start


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the real model."""
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2_tp2() -> str:
    """Folder of the real model, padded so that two ranks divide it."""
    return resolve_model("smollm2-135m-tp2")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer Llama without weights (``load_format="dummy"``), byte vocabulary."""
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tiny_with_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with random weights by which outputs depend on every block of the cache."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny-with-weights"))
    return str(write_tiny_weights(folder))


@pytest.fixture(
    scope="module",
    params=["tiny_with_weights", pytest.param("smollm2", marks=pytest.mark.complete)],
)
def model(request: pytest.FixtureRequest) -> str:
    """Folder of a model whose outputs mean something."""
    folder: str = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="session")
def folder(tiny: str) -> Path:
    """The same, as memshare/lab/simulate/harness.py wants it."""
    return Path(tiny)
