"""Speculative decoding by draft models with KV caches of their own, which change hands with the
model's. Compaction beside them is in compaction/test_kinds.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memshare.lab.bench.exactness import COPIES, IDENTICAL_ONLY, OTHERS, PROMPT
from tests.memshare.engine.harness import Engine, StartEngine
from tests.memshare.engine.speculation.drafts import DRAFTS, METHODS, write_draft

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(600)]

CHECKED = IDENTICAL_ONLY | {"integrity": {"check_every": 1, "on_failure": "raise"}}
OPTIONS: dict[str, Any] = {
    "num_gpu_blocks_override": 50, "max_model_len": 1024, "dtype": "float32",
}  # fmt: skip
TOKENS = 128


@pytest.fixture(scope="module")
def expected(start_engine: StartEngine, tiny_with_weights: str) -> list[tuple[int, ...]]:
    """What plain vLLM writes without drafts."""
    with start_engine(tiny_with_weights, None, **OPTIONS) as engine:
        return copies(engine)


@pytest.fixture(scope="module", params=METHODS)
def engine(
    request: pytest.FixtureRequest,
    expected: list[tuple[int, ...]],
    start_engine: StartEngine,
    tiny_with_weights: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    """After the plain one has ended: two engines in one process disturb each other."""
    folder = tmp_path_factory.mktemp("draft") / request.param
    draft = write_draft(request.param, Path(tiny_with_weights), folder)
    options = OPTIONS | {"speculative_config": draft}
    with start_engine(tiny_with_weights, CHECKED, **options) as engine:
        yield engine


def copies(engine: Engine) -> list[tuple[int, ...]]:
    return engine.generate([PROMPT] * COPIES + OTHERS, TOKENS)[:COPIES]


def too_early(engine: Engine) -> int:
    """Write the copies; how often a block counted as full that a draft may yet write to."""
    side, found = engine.side, 0
    build_message = side.build_message

    def watched(scheduled: Any) -> Any:
        nonlocal found
        message = build_message(scheduled)
        for state in side.tracker:
            request = state.request
            settled = request.num_computed_tokens - request.num_in_flight_tokens - 1 - DRAFTS
            found += state.full > side.tables.token_map.full(max(0, settled))
        return message

    side.build_message = watched
    copies(engine)
    side.build_message = build_message
    return found


@pytest.mark.proves("drafts")
def test_identical_blocks_share_exactly(engine: Engine, expected: list[tuple[int, ...]]) -> None:
    assert copies(engine) == expected
    totals = engine.totals
    assert engine.metric("vllm:spec_decode_num_accepted_tokens") > 0
    assert totals["applied"] >= COPIES
    assert totals["blocks_reclaimed"] >= COPIES
    assert totals["integrity_checks:failed"] == 0
    assert engine.is_clean()


def test_what_a_draft_may_write_again_stays(engine: Engine) -> None:
    assert too_early(engine) == 0
    engine.side._unsettled = 0
    assert too_early(engine) > 0, "negative control"
    assert engine.is_clean()
