"""KV caches of any groups of layers, and requests that grow in them: vLLM's own classes."""

from __future__ import annotations

from typing import Any

import torch

from memshare.core.interfaces import BlockTables
from memshare.engine.adapter import vllm_adapter

BLOCK = 16
BLOCKS = 40


def specs(*kinds: str) -> Any:
    """A KV cache of so many groups, of the kinds below."""
    from vllm.v1 import kv_cache_interface as kv
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum as Kinds

    heads = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    made = {
        "full": lambda: kv.FullAttentionSpec(**heads),
        "windowed": lambda: kv.FullAttentionSpec(**heads, sliding_window=64),
        "sliding": lambda: kv.SlidingWindowSpec(**heads, sliding_window=64),
        "chunked": lambda: kv.ChunkedLocalAttentionSpec(**heads, attention_chunk_size=64),
        "mla": lambda: kv.MLAAttentionSpec(**heads),
        "mamba": lambda: kv.MambaSpec(
            block_size=BLOCK, shapes=((8, 8),), dtypes=(torch.float32,), mamba_type=Kinds.MAMBA2
        ),
        "gdn": lambda: kv.MambaSpec(
            block_size=BLOCK,
            shapes=((8, 8),),
            dtypes=(torch.float32,),
            mamba_type=Kinds.GDN_ATTN,
            mamba_cache_mode="align",
        ),
    }
    groups = [kv.KVCacheGroupSpec([f"{kind}.{i}"], made[kind]()) for i, kind in enumerate(kinds)]
    return kv.KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


class Scheduled:
    """vLLM's KV cache manager with the adapter's tables, and requests that grow in it."""

    def __init__(self, cache: Any, hash_block: int = BLOCK) -> None:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        hashing = get_hash_fn_by_name("sha256")
        init_none_hash(hashing)
        self.hasher = get_request_block_hasher(hash_block, hashing)
        self.manager = KVCacheManager(
            cache, max_model_len=1024, scheduler_block_size=BLOCK, hash_block_size=hash_block
        )
        self.group = vllm_adapter().editable_group(cache)
        self.tables: BlockTables = vllm_adapter().block_tables(self.manager, self.group)

    def request(self, name: str, tokens: list[int]) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=500)
        params.update_from_generation_config({}, eos_token_id=None)
        return Request(name, tokens, params, None, block_hasher=self.hasher)

    def start(self, name: str, tokens: int) -> Any:
        """A request whose prompt has been computed."""
        request = self.request(name, [sum(map(ord, name)), *range(tokens - 1)])
        self.compute(request, tokens)
        return request

    def compute(self, request: Any, tokens: int) -> None:
        """One step that computes so many tokens; those that are missing are generated."""
        missing = request.num_computed_tokens + tokens - request.num_tokens
        if missing > 0:
            request.append_output_token_ids([7] * missing)
        assert self.manager.allocate_slots(request, tokens) is not None
        request.num_computed_tokens += tokens

    def published(self, request: Any) -> int:
        """Tokens that another request with the same text would find in the prefix cache."""
        twin = self.request("twin", [*request.all_token_ids, 9])
        return int(self.manager.get_computed_blocks(twin)[1])
