"""The adapter to vLLM 0.32: the functions of :class:`memshare.engine.adapter.Adapter`.

Modules are imported when they are asked for: a scheduler needs no worker's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from memshare.core.interfaces import (
    AttentionView,
    BlockTables,
    CacheGroup,
    EngineRequest,
    PageSelector,
    WorkerTables,
)
from memshare.engine.vllm_0_32.schedule import read_growth, read_schedule

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from memshare.agents.family import Family
    from memshare.agents.memory import HeadLayout
    from memshare.config import SelectionConfig
    from memshare.engine.adapter import ExpertRouting
    from memshare.engine.vllm_0_32.model_memory import ModelMemory
    from memshare.kv.layout import CachedLayer
    from memshare.search.vocabulary import Tokenizer

__all__ = [
    "attention_layers",
    "attention_view",
    "base_worker",
    "block_tables",
    "builder_refusals",
    "cache_refusals",
    "editable_group",
    "expert_refusals",
    "expert_routing",
    "hash_by_family",
    "install_family",
    "install_selection",
    "install_view",
    "number_adapter",
    "padded_head_sizes",
    "page_selector",
    "plan_cache",
    "read_growth",
    "read_model_memory",
    "read_schedule",
    "selection_refusals",
    "selector_refusals",
    "tokenizer",
    "value_refusals",
    "view_refusals",
    "worker_tables",
]


def cache_refusals(cache: KVCacheConfig) -> Iterator[str]:
    """See :meth:`Adapter.cache_refusals`."""
    from memshare.engine.vllm_0_32 import cache_groups

    return cache_groups.cache_refusals(cache)


def editable_group(cache: KVCacheConfig) -> CacheGroup:
    """See :meth:`Adapter.editable_group`."""
    from memshare.engine.vllm_0_32 import cache_groups

    return cache_groups.editable_group(cache)


def block_tables(manager: KVCacheManager, group: CacheGroup) -> BlockTables:
    """See :meth:`Adapter.block_tables`."""
    from memshare.engine.vllm_0_32.block_tables import ManagerTables

    return ManagerTables(manager, group)


def worker_tables(runner: object, group: CacheGroup) -> WorkerTables:
    """See :meth:`Adapter.worker_tables`."""
    from memshare.engine.vllm_0_32.worker_tables import tables_of

    return tables_of(cast(Any, runner), group)


def view_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """See :meth:`Adapter.view_refusals`."""
    from memshare.engine.vllm_0_32.view import attention_view

    return attention_view.view_refusals(vllm_config)


def install_view(vllm_config: VllmConfig) -> None:
    """See :meth:`Adapter.install_view`."""
    from memshare.engine.vllm_0_32.view import attention_view

    attention_view.install_view(vllm_config)


def builder_refusals(runner: object, group: CacheGroup) -> Iterator[str]:
    """See :meth:`Adapter.builder_refusals`."""
    from memshare.engine.vllm_0_32.view import attention_view

    return attention_view.builder_refusals(runner, group)


def attention_view(runner: object, group: CacheGroup) -> AttentionView:
    """See :meth:`Adapter.attention_view`."""
    from memshare.engine.vllm_0_32.view import attention_view

    return attention_view.attach_view(runner, group)


def selection_refusals(vllm_config: VllmConfig, config: SelectionConfig) -> Iterator[str]:
    """See :meth:`Adapter.selection_refusals`."""
    from memshare.engine.vllm_0_32.view import selection_setup

    return selection_setup.selection_refusals(vllm_config, config)


def install_selection(vllm_config: VllmConfig) -> None:
    """See :meth:`Adapter.install_selection`."""
    from memshare.engine.vllm_0_32.view import selection_setup

    selection_setup.install_selection(vllm_config)


def selector_refusals(
    vllm_config: VllmConfig, runner: object, group: CacheGroup, caches: Mapping[str, Tensor]
) -> Iterator[str]:
    """See :meth:`Adapter.selector_refusals`."""
    from memshare.engine.vllm_0_32.view import selection_setup

    return selection_setup.selector_refusals(vllm_config, runner, group, caches)


def page_selector(
    config: SelectionConfig,
    vllm_config: VllmConfig,
    runner: object,
    group: CacheGroup,
    caches: Mapping[str, Tensor],
) -> PageSelector:
    """See :meth:`Adapter.page_selector`."""
    from memshare.engine.vllm_0_32.view import selection_setup

    return selection_setup.attach_selector(config, vllm_config, runner, group, caches)


def attention_layers(vllm_config: VllmConfig, runner: object) -> Mapping[str, CachedLayer]:
    """See :meth:`Adapter.attention_layers`."""
    from memshare.engine.vllm_0_32.attention_layers import layers_of

    return layers_of(vllm_config, cast(Any, runner).get_model())


def tokenizer(vllm_config: VllmConfig) -> Tokenizer:
    """See :meth:`Adapter.tokenizer`."""
    from vllm.tokenizers import cached_tokenizer_from_config

    return cast("Tokenizer", cached_tokenizer_from_config(vllm_config.model_config))


def base_worker() -> type[Any]:
    """See :meth:`Adapter.base_worker`."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from memshare.engine.vllm_0_32.cpu_worker import SeedSafeCPUWorker

        return SeedSafeCPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def read_model_memory(vllm_config: VllmConfig, heads: HeadLayout | None = None) -> ModelMemory:
    """See :meth:`Adapter.read_model_memory`."""
    from memshare.engine.vllm_0_32 import model_memory

    return model_memory.read_model_memory(vllm_config, heads)


def plan_cache(vllm_config: VllmConfig, model_memory: ModelMemory, kv_bytes: int) -> KVCacheConfig:
    """See :meth:`Adapter.plan_cache`."""
    from memshare.engine.vllm_0_32 import model_memory as planner

    return planner.plan_cache(vllm_config, model_memory, kv_bytes)


def value_refusals(vllm_config: VllmConfig, width: int) -> Iterator[str]:
    """See :meth:`Adapter.value_refusals`."""
    from memshare.engine.vllm_0_32 import shared_values

    return shared_values.value_refusals(vllm_config, width)


def install_family(vllm_config: VllmConfig, runner: object, family: Family) -> None:
    """See :meth:`Adapter.install_family`."""
    from memshare.engine.vllm_0_32 import lora_slots

    lora_slots.install_family(vllm_config, runner, family)


def number_adapter(request: EngineRequest, number: Callable[[str], int]) -> None:
    """See :meth:`Adapter.number_adapter`."""
    from memshare.engine.vllm_0_32 import lora_slots

    lora_slots.number_adapter(cast(Any, request), number)


def hash_by_family(key: str, admit: Callable[[LoRARequest], None]) -> None:
    """See :meth:`Adapter.hash_by_family`."""
    from memshare.engine.vllm_0_32 import family_hashes

    family_hashes.hash_by_family(key, admit)


def expert_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """See :meth:`Adapter.expert_refusals`."""
    from memshare.engine.vllm_0_32 import expert_routing as routing

    return routing.routing_refusals(vllm_config)


def expert_routing(vllm_config: VllmConfig, runner: object) -> ExpertRouting:
    """See :meth:`Adapter.expert_routing`."""
    from memshare.engine.vllm_0_32.expert_routing import RoutedExperts

    return RoutedExperts(vllm_config, cast(Any, runner).get_model())


def padded_head_sizes() -> list[int]:
    """See :meth:`Adapter.padded_head_sizes`."""
    from memshare.engine.vllm_0_32.value_layout import padded_sizes

    return padded_sizes()
