"""The connector's half in the scheduler's process for adapters that share a cache: whose requests
may use it, and what they find of each other's.

Nothing is reclaimed beside it (``mode: off``), so that it counts and reports alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memshare.core.block_writers import BlockWriters
from memshare.core.interfaces import BlockGrowth, EngineRequest
from memshare.core.token_map import TokenMap
from memshare.engine.agents import FamilyRequests
from memshare.engine.usage import ReturnedUsage, returned_usage
from memshare.telemetry.stats import Counters, Payload

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig

    from memshare.agents.family import Family


class FamilySide:
    """Every method is called on the engine's thread, but what :attr:`requests` is asked.

    Attributes:
        requests: whose they are.
        counters: what has been found, by adapter.
    """

    def __init__(self, family: Family, cache: KVCacheConfig, head_dim: int) -> None:
        """Take hold of nothing: what is scheduled says who writes which block.

        Args:
            family: the adapters that share.
            cache: of a worker.
            head_dim: width of the model's heads, without low-rank columns.
        """
        self.requests = FamilyRequests(family)
        self.counters = Counters()
        (group,) = cache.kv_cache_groups  # all layers have full attention
        token_map = TokenMap(group.kv_cache_spec.block_size)
        self._writers = BlockWriters(cache.num_blocks, token_map)
        taken = low_rank_bytes(cache, head_dim) if family.width else 0
        self._gauges = {"low_rank_bytes": float(taken)}

    def take(self, growth: BlockGrowth) -> None:
        """Take what a step has been scheduled to write, and count what was found for it."""
        for found in self._writers.take(growth):
            self.counters.add_labelled("agent_tokens_found", found.adapter, found.found)
            self.counters.add_labelled("agent_tokens_shared", found.adapter, found.shared)

    def finish(self, request: EngineRequest, entries: int) -> ReturnedUsage | None:
        """A request ends.

        Args:
            request: vLLM's own object.
            entries: of its block table.

        Returns:
            What goes back with its last output; None if it has not asked for anything.
        """
        read = self._writers.finish(request.request_id)
        return returned_usage(request, None, entries, read)

    def take_stats(self) -> Payload | None:
        """What has changed since the last call; None if nothing has."""
        return self.counters.take(self._gauges)


def low_rank_bytes(cache: KVCacheConfig, head_dim: int) -> int:
    """Bytes of a worker's cache that low-rank columns take, with what pads heads for their sake.

    Args:
        cache: of the worker, whose layers are one group: all have full attention.
        head_dim: width of the model's heads without them.
    """
    (group,) = cache.kv_cache_groups
    spec: AttentionSpec = group.kv_cache_spec  # type: ignore[assignment]
    width = spec.head_size + spec.head_size_v
    page = spec.page_size_bytes * (width - 2 * head_dim) // width
    return cache.num_blocks * len(group.layer_names) * page
