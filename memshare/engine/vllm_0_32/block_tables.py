"""vLLM's block pool and block tables, on the scheduler's side.

vLLM keeps, per request, a list of :class:`KVCacheBlock` objects (``req_to_blocks``), and in each
block a reference count (vllm/v1/core/block_pool.py, single_type_kv_cache_manager.py). Everything
here keeps their invariant: a block's count is the number of table entries that point to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memshare.core.footprint import Footprint
from memshare.core.interfaces import CacheGroup
from memshare.core.token_map import TokenMap

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

# Beyond any number of blocks: SingleTypeKVCacheManager.cache_blocks returns early.
_NEVER_PUBLISH_AGAIN = 1 << 30


class ManagerTables:
    """:class:`~memshare.core.interfaces.BlockTables` of vLLM's KV cache manager.

    Attributes:
        token_map: where tokens lie in the tables that may be edited.
        footprint: how many blocks tokens take, in all tables.
        publishes_prompt_end: whether hashes are made of fewer tokens than a block has
            (``FullAttentionManager._cache_partial_tail_block``).
    """

    def __init__(self, manager: KVCacheManager, group: CacheGroup) -> None:
        """Take hold of a manager.

        Args:
            manager: vLLM's.
            group: the layers whose table may be edited.
        """
        self._pool = manager.block_pool
        self._cache = manager
        self._managers = tuple(manager.coordinator.single_type_managers)
        self._manager = self._managers[group.index]
        self._configured_watermark: int = manager.watermark_blocks
        self.token_map = TokenMap(group.block_size)
        self.footprint = Footprint(self.token_map, group.beside)
        self.publishes_prompt_end = self._pool.hash_block_size != group.block_size
        self._group_maps = tuple(TokenMap(each.block_size) for each in self._managers)
        # Of all groups, each size once: a block of any of them may be published.
        self._maps = tuple(set(self._group_maps))

    @property
    def total(self) -> int:
        """KV blocks that requests can use (the null block is not one)."""
        return int(self._pool.num_gpu_blocks) - 1

    @property
    def free(self) -> int:
        """Free KV blocks."""
        return int(self._pool.get_num_free_blocks())

    def table(self, request_id: str) -> list[KVCacheBlock] | None:
        """The request's blocks, live, in order; None while it holds none."""
        blocks: list[KVCacheBlock] | None = self._manager.req_to_blocks.get(request_id)
        return blocks

    def entries(self, request_id: str) -> int:
        """How many entries the request's table has; 0 while it holds no blocks."""
        return len(self._manager.req_to_blocks.get(request_id, ()))

    def publishes_soon(self, request: Any) -> bool:
        """Whether the step that is being scheduled may publish a block of this request.

        ``allocate_slots`` publishes a block in the step that completes it. A first remap in that
        very step would let approximate KV enter the prefix cache.
        """
        done = request.num_computed_tokens
        ahead = request.num_tokens_with_spec + request.num_output_placeholders
        return any(each.full(ahead) != each.full(done) for each in self._maps)

    def repoint(self, request_id: str, index: int, donor: Any) -> int:
        """See :meth:`BlockTables.repoint`."""
        blocks = self._manager.req_to_blocks[request_id]
        target = blocks[index]
        before = self.free
        self._pool.touch([donor])
        blocks[index] = donor
        self._pool.free_blocks([target])
        return self.free - before

    def drop_entries(self, request_id: str, indexes: Sequence[int]) -> int:
        """See :meth:`BlockTables.drop_entries`. vLLM's sliding windows leave the same behind."""
        blocks = self._manager.req_to_blocks[request_id]
        dropped = [blocks[index] for index in indexes]
        assert not any(block.is_null for block in dropped), f"{request_id}: a hole already"
        before = self.free
        for index in indexes:
            blocks[index] = self._pool.null_block
        self._pool.free_blocks(dropped)
        return self.free - before

    def make_writable(self, request_id: str, indexes: Sequence[int]) -> bool:
        """See :meth:`BlockTables.make_writable`."""
        blocks = self._manager.req_to_blocks[request_id]
        return self._evict([blocks[index] for index in indexes])

    def unpublish_step(self, request: Any) -> bool:
        """See :meth:`BlockTables.unpublish_step`.

        ``allocate_slots`` has published what ends behind ``num_computed_tokens``, which does not
        count this step's tokens yet.
        """
        begun = [
            block
            for manager, each in zip(self._managers, self._group_maps, strict=True)
            for block in manager.req_to_blocks.get(request.request_id, ())[
                each.full(request.num_computed_tokens) :
            ]
            if block.block_hash is not None
        ]
        return self._evict(begun)

    def _evict(self, blocks: Sequence[KVCacheBlock]) -> bool:
        if any(block.ref_cnt != 1 or block.is_null for block in blocks):
            return False
        self._cache.evict_blocks({block.block_id for block in blocks})
        return all(self._pool.is_block_writable(block) for block in blocks)

    def blocks_to_admit(self, request: Any) -> int:
        """See :meth:`BlockTables.blocks_to_admit`. The same questions as ``allocate_slots`` asks
        before an admission (``full_sequence_must_fit``), which change nothing."""
        cache, tokens = self._cache, min(request.num_tokens, self._cache.max_model_len)
        hits, found = cache.empty_kv_cache_blocks.blocks, 0
        if cache.prefix_cache_lookup_enabled(request):
            hits, found, _ = cache.coordinator.find_longest_cache_hit(
                request.block_hashes, request.num_tokens - 1
            )
        return int(
            cache.coordinator.get_num_blocks_to_allocate(
                request.request_id, tokens, hits, num_encoder_tokens=0,
                total_computed_tokens=found, num_local_computed_tokens=found,
                num_tokens_main_model=tokens, apply_admission_cap=True,
                prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
            )
        )  # fmt: skip

    def keep_free(self, blocks: int) -> None:
        """Let vLLM admit a waiting request only if so many blocks stay free.

        The user's own ``watermark`` stays the least. vLLM ignores both while nothing runs, so no
        request waits for ever.
        """
        self._cache.watermark_blocks = max(self._configured_watermark, blocks)

    def stop_publishing(self, request_id: str) -> None:
        """See :meth:`BlockTables.stop_publishing`.

        vLLM forgets this count when it frees the request, so a preempted request, which is computed
        again exactly, publishes again.
        """
        for manager in self._managers:
            manager.num_cached_block[request_id] = _NEVER_PUBLISH_AGAIN

    def is_publishing(self, request_id: str) -> bool:
        """Whether blocks of this request may still enter the prefix cache."""
        return any(
            manager.num_cached_block.get(request_id, 0) < _NEVER_PUBLISH_AGAIN
            for manager in self._managers
        )

    def reference_faults(self) -> list[str]:
        """Blocks whose count is not the number of entries that point to them; [] if all is well."""
        entries: dict[int, int] = {}
        for manager in self._managers:
            for blocks in manager.req_to_blocks.values():
                for block in blocks:
                    entries[block.block_id] = entries.get(block.block_id, 0) + 1
        faults = []
        for block in self._pool.blocks:
            pointing = entries.get(block.block_id, 0)
            if not block.is_null and block.ref_cnt != pointing:
                faults.append(
                    f"block {block.block_id}: ref_cnt is {block.ref_cnt}, but {pointing} table "
                    "entries point to it"
                )
        in_use = sum(1 for block in self._pool.blocks if block.ref_cnt > 0 and not block.is_null)
        if in_use + self.free != self.total:
            faults.append(f"{in_use} blocks in use and {self.free} free do not make {self.total}")
        return faults

    def block_ids(self) -> dict[str, list[int]]:
        """Block ids of every request that holds blocks."""
        return {
            request_id: [block.block_id for block in blocks]
            for request_id, blocks in self._manager.req_to_blocks.items()
        }
