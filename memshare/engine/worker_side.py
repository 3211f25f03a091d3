"""The connector's worker half: hands each mechanism its commands, takes what it reports."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from memshare.config import MemShareConfig, registry
from memshare.core.interfaces import AttentionView, PageSelector, WorkerTables
from memshare.core.token_map import TokenMap
from memshare.engine.adapter import vllm_adapter
from memshare.engine.compatibility import check_builders, check_selector, edits_view
from memshare.engine.messages import SchedulerMessage, WorkerHandshake, WorkerMessage
from memshare.mechanisms.contract import WorkerContext, WorkerPart

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


class WorkerSide:
    """One rank's half. Built with the connector, completed by :meth:`attach`.

    Attributes:
        parts: the mechanisms' worker parts by policy name.
    """

    def __init__(
        self, config: MemShareConfig, vllm_config: VllmConfig, cache: KVCacheConfig
    ) -> None:
        self.parts: dict[str, WorkerPart] = {}
        self._config = config
        self._vllm_config = vllm_config
        self._group = vllm_adapter().editable_group(cache)
        self._kv_caches: Mapping[str, Tensor] = {}
        self._tables: WorkerTables | None = None
        self._view: AttentionView | None = None
        self._selector: PageSelector | None = None
        self._tables_wanted: dict[str, list[int]] | None = None
        self._check_wanted = False

    def register(self, kv_caches: Mapping[str, Tensor]) -> None:
        """Remember the caches, ``[blocks, heads, slots, 2 * channels]`` by layer name."""
        self._kv_caches = kv_caches

    def attach(self, runner: object) -> None:
        """Take hold of the model runner, whose tables are edited.

        Raises:
            ComparisonUnsupported: blocks of this model cannot be compared.
            UnsupportedSetup: tokens can't be hidden from some of its attention, or it cannot choose
                pages.
        """
        adapter = vllm_adapter()
        if edits_view(self._config):
            check_builders(runner, self._group)
            self._view = adapter.attention_view(runner, self._group)
        if self._config.selection.on:
            attention = self._vllm_config, runner, self._group, self._kv_caches
            check_selector(*attention)
            self._selector = adapter.page_selector(self._config.selection, *attention)
        self._tables = adapter.worker_tables(runner, self._group)
        layers = adapter.attention_layers(self._vllm_config, runner)
        own = set(self._group.layers) & layers.keys()
        parallel = self._vllm_config.parallel_config
        context = WorkerContext(
            config=self._config,
            tables=self._tables,
            token_map=TokenMap(self._group.block_size),
            layers=layers,
            caches={name: cache for name, cache in self._kv_caches.items() if name in own},
            view=self._view,
            selector=self._selector,
            model=self._vllm_config.model_config.model,
            tensor_rank=parallel.rank % parallel.tensor_parallel_size,
            tensor_ranks=parallel.tensor_parallel_size,
        )
        for name, mechanism in registry.mechanisms_of(self._config).items():
            self.parts[name] = mechanism.worker_part(context)
        logger.info("MemShare hooked %s", type(runner).__name__)

    def handshake(self) -> WorkerHandshake:
        """What this rank reports to the scheduler before the first step."""
        return WorkerHandshake(hooked=self._tables is not None, policy=self._config.policy.name)

    def before_step(self, message: SchedulerMessage) -> None:
        """Hand out the step's commands. Must run before the runner reads its tables."""
        self._tables_wanted = message.tables
        self.forget_step()
        for name, commands in message.commands.items():
            part = self.parts.get(name)
            if part is not None:
                part.before_step(commands)

    def forget_step(self) -> None:
        """What attention was told of the last step is over: another begins, or a dummy run."""
        if self._view is not None:
            self._view.clear()
        if self._selector is not None:
            self._selector.clear()

    def after_step(self) -> WorkerMessage | None:
        """What this rank has to report; None if nothing."""
        results = {}
        for name, part in self.parts.items():
            reported = part.after_step()
            if reported is not None:
                results[name] = reported
        wanted, self._tables_wanted = self._tables_wanted, None
        faults = self._compare_tables(wanted) if wanted is not None else None
        if not results and faults is None and not self._check_wanted:
            return None
        answer = WorkerMessage(results, faults, self._check_wanted)
        self._check_wanted = False
        return answer

    def want_check(self) -> None:
        """Ask the scheduler, with the next answer, for an integrity check."""
        self._check_wanted = True

    def _compare_tables(self, expected: dict[str, list[int]]) -> list[str]:
        assert self._tables is not None
        faults = []
        for request_id, blocks in expected.items():
            ours = self._tables.block_ids(request_id, len(blocks))
            if ours is not None and ours != blocks:
                wrong = next(
                    (i for i, (a, b) in enumerate(zip(ours, blocks, strict=False)) if a != b),
                    len(ours),
                )
                faults.append(
                    f"request {request_id}: worker's table differs from the scheduler's at entry "
                    f"{wrong} ({ours[wrong : wrong + 1]} against {blocks[wrong : wrong + 1]})"
                )
        return faults
