"""MemShare beside vLLM's offloading connector, with its real scheduler, in a real engine.

What one copies and what the other changes must be disjoint. Each claim is seen to fail without the
rule that it rests on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from memshare.engine import compatibility
from memshare.engine.scheduler_side import IntegrityError
from memshare.plug_in import plug_in
from tests.memshare.engine.harness import Engine, StartEngine
from tools.bench.host_memory.spec import HostWorker, host_memory

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CHECKED = {"integrity": {"check_every": 1, "on_failure": "raise"}}
OLDEST = CHECKED | {
    "policy": {"name": "oldest"},
    "budget": {"max_shared_fraction": 0.4},
    "trigger": {"kind": "eager"},
    "protect": {"recent_tokens": 32},
}
COMPACTION = CHECKED | {
    "policy": {"name": "compaction", "scorer": "recency"},
    "budget": {"max_dropped_fraction": 0.4},
}
PROMPTS = [
    f"Prompt number {number}: " + "tell me of the sea and the fox and the owl " * 3
    for number in range(6)
]
TOKENS = 200


@contextmanager
def beside(
    start_engine: StartEngine, model: str, memshare: dict[str, Any], blocks: int, **host: Any
) -> Iterator[Engine]:
    options = plug_in(memshare, beside=[host_memory(**host)])
    sizes = {"max_model_len": 512, "num_gpu_blocks_override": blocks, "max_num_seqs": 8}
    with start_engine(model, None, **sizes, **options) as engine:
        yield engine


def children(engine: Engine) -> tuple[Any, Any]:
    """MemShare's scheduler half, and the offloading connector's."""
    ours, theirs = engine.scheduler.connector.sub_connectors
    return ours.scheduler_side, theirs.connector_scheduler


def host(engine: Engine) -> HostWorker:
    """What copies blocks in this engine."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker: HostWorker = get_kv_transfer_group().sub_connectors[1].connector_worker.worker
    return worker


class Overlaps:
    """Counts, after each step's schedule, what is copied although MemShare may change it.

    Attributes:
        tainted: stores of requests that are not exact any more.
        lost: blocks under way to the host that their running request does not hold any more, summed
            over steps.
    """

    def __init__(self, engine: Engine) -> None:
        self.tainted = self.lost = self.stores = 0
        self._copied: dict[int, tuple[str, list[int]]] = {}
        self._side, self._theirs = children(engine)
        self._build = self._theirs.build_connector_meta
        self._theirs.build_connector_meta = self._look

    def _look(self, output: Any) -> Any:
        meta = self._build(output)
        for job_id, job in meta.store_jobs.items():
            self.stores += 1
            state = self._side.tracker.get(job.req_id)
            self.tainted += state is not None and state.tainted_from is not None
            self._copied[job_id] = job.req_id, [int(block) for block in job.src_spec.block_ids]
        for job_id in self._copied.keys() & self._theirs._jobs.keys():
            request_id, blocks = self._copied[job_id]
            table = self._side.tables.table(request_id)
            if table is not None:
                held = {block.block_id for block in table}
                self.lost += sum(block not in held for block in blocks)
        return meta


def asked(engine: Engine, tokens: int = TOKENS, **extra: Any) -> list[tuple[int, ...]]:
    return engine.generate(PROMPTS, tokens, extra_args=extra or None)


@pytest.mark.proves("offloading")
def test_what_is_stored_stays_as_it_was_computed(
    start_engine: StartEngine, tiny_with_weights: str
) -> None:
    with beside(start_engine, tiny_with_weights, OLDEST, blocks=80, lag=100) as engine:
        overlaps = Overlaps(engine)
        asked(engine)
        side, _ = children(engine)
        totals = side.recorder.counters.totals
        assert totals["applied"] > 20
        assert overlaps.stores >= len(PROMPTS)
        assert (overlaps.tainted, overlaps.lost) == (0, 0)
        reclaimed = engine.metric("vllm:memshare_blocks_reclaimed")
        assert reclaimed == totals["blocks_reclaimed"] > 20
        assert engine.is_clean()


def test_a_store_of_generated_tokens_overlaps(
    start_engine: StartEngine, tiny_with_weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above, with the rule off."""
    monkeypatch.setattr(compatibility, "beside_faults", lambda *_: iter(()))
    options = {"blocks": 80, "lag": 100, "prompts_only": False}
    with beside(start_engine, tiny_with_weights, OLDEST, **options) as engine:
        overlaps = Overlaps(engine)
        asked(engine)
        assert overlaps.tainted > 0
        assert overlaps.lost > 0


@pytest.fixture(scope="module")
def expected(start_engine: StartEngine, tiny_with_weights: str) -> list[tuple[int, ...]]:
    """What plain vLLM writes."""
    with start_engine(tiny_with_weights, None, max_model_len=512) as dense:
        return asked(dense)


@pytest.mark.proves("offloading")
def test_prompts_come_back_from_the_host_exact(
    start_engine: StartEngine, tiny_with_weights: str, expected: list[tuple[int, ...]]
) -> None:
    with beside(start_engine, tiny_with_weights, COMPACTION, blocks=50) as engine:
        asked(engine)  # under pressure
        side, _ = children(engine)
        print(side.recorder.counters.totals)
        assert side.recorder.counters.totals["tokens_dropped"] > 0
        assert engine.scheduler.kv_cache_manager.block_pool.reset_prefix_cache()
        before = len(host(engine).loaded)
        assert asked(engine, memshare="off") == expected
        assert len(host(engine).loaded) >= before + len(PROMPTS)
        # The control: what lies in host memory is what is computed with.
        assert engine.scheduler.kv_cache_manager.block_pool.reset_prefix_cache()
        for memory in host(engine).memory:
            memory.zero_()
        assert asked(engine, memshare="off") != expected
        assert engine.is_clean()


@pytest.mark.parametrize("remembers", [True, False])
def test_checks_know_who_waits_for_the_host(
    start_engine: StartEngine, tiny_with_weights: str, remembers: bool
) -> None:
    """Preempted requests are given new blocks, and wait for the host to fill them, while workers
    remember the old ones. Without that knowledge (the control) checks fail for no reason."""

    class Forgetful(set[str]):
        def add(self, request_id: str) -> None:
            pass

    tight = CHECKED | {"policy": {"name": "oldest"}, "budget": {"max_shared_fraction": 0.1}}
    with beside(start_engine, tiny_with_weights, tight, blocks=30) as engine:
        side, _ = children(engine)
        if remembers:
            asked(engine)
            assert engine.metric("vllm:num_preemptions") > 0
            assert len(host(engine).loaded) > 0
            assert engine.is_clean()
        else:
            side.tracker.unsent = Forgetful()
            with pytest.raises(IntegrityError, match="worker's table differs"):
                asked(engine)
