"""The one way to what is not vLLM's public API: an adapter for each version (docs/porting.md).

An adapter is the module ``adapter`` of a package beside this one; its functions are those of
:class:`Adapter`. The rest of ``memshare/engine/`` asks :func:`vllm_adapter` for it, and works with
the interfaces of :mod:`memshare.core.interfaces` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from memshare.core.interfaces import (
    AskedAdapter,
    AttentionView,
    BlockGrowth,
    BlockTables,
    CacheGroup,
    EngineRequest,
    PageSelector,
    Scheduled,
    WorkerTables,
)
from memshare.engine.versions import ADAPTERS, check_vllm_version

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from memshare.agents.family import Family
    from memshare.agents.memory import HeadLayout
    from memshare.config import SelectionConfig
    from memshare.kv.layout import CachedLayer
    from memshare.search.vocabulary import Tokenizer


UNBOUNDED = 1 << 50
"""Bytes: a cache that holds anything, to look at its groups and not at its size."""


class ModelMemory(Protocol):
    """What one worker of a model holds."""

    @property
    def weight_bytes(self) -> int:
        """All its weights."""
        ...

    @property
    def lora_bytes(self) -> int:
        """The engine's slots for LoRA adapters, used or not."""
        ...

    @property
    def layers(self) -> Mapping[str, KVCacheSpec]:
        """The cache of each layer that has one."""
        ...


class ExpertRouting(Protocol):
    """What a model's routers chose in the step that ran last, on one rank."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts, ascending."""
        ...

    def listen(self, on: bool) -> None:
        """Say whether the step that runs next will be looked at. The same on all ranks."""
        ...

    def ids(self, tokens: int) -> Tensor:
        """``[tokens, layers, chosen]``: the experts of each token, in the order in which the step
        had them."""
        ...

    def counts(self, tokens: int) -> Tensor:
        """``[layers, experts]``, int32 on the model's device: how many of the tokens chose each.
        Overwritten by the next call."""
        ...


class Adapter(Protocol):
    """Everything that MemShare takes from inside vLLM."""

    def cache_refusals(self, cache: KVCacheConfig) -> Iterator[str]:
        """What cannot be shared of a model's KV cache, each with the way out."""
        ...

    def editable_group(self, cache: KVCacheConfig) -> CacheGroup:
        """The layers with full attention, whose block table mechanisms may edit."""
        ...

    def block_tables(self, manager: KVCacheManager, group: CacheGroup) -> BlockTables:
        """The scheduler's tables of that group."""
        ...

    def worker_tables(self, runner: object, group: CacheGroup) -> WorkerTables:
        """The tables of that group in a worker's model runner, whichever it is."""
        ...

    def view_refusals(self, vllm_config: VllmConfig) -> Iterator[str]:
        """What a view cannot work with, each with the way out. Asked before the model is loaded,
        and again when its layers are there."""
        ...

    def install_view(self, vllm_config: VllmConfig) -> None:
        """Let the attention layers of a model that has just been loaded read through a view. Before
        vLLM profiles memory or captures graphs."""
        ...

    def builder_refusals(self, runner: object, group: CacheGroup) -> Iterator[str]:
        """Which of the runner's attention does not read that group through the view."""
        ...

    def attention_view(self, runner: object, group: CacheGroup) -> AttentionView:
        """The view through which that group is read; see :meth:`builder_refusals` first."""
        ...

    def selection_refusals(self, vllm_config: VllmConfig, config: SelectionConfig) -> Iterator[str]:
        """Why attention cannot choose pages, each with the way out. Asked before the model is
        loaded, and again when its layers are there."""
        ...

    def install_selection(self, vllm_config: VllmConfig) -> None:
        """Let the attention layers of a model that has just been loaded plan selections. Behind
        :meth:`install_view`, so that holes are left out first."""
        ...

    def selector_refusals(
        self,
        vllm_config: VllmConfig,
        runner: object,
        group: CacheGroup,
        caches: Mapping[str, Tensor],
    ) -> Iterator[str]:
        """Which attention of the runner cannot choose, once its caches are there."""
        ...

    def page_selector(
        self,
        config: SelectionConfig,
        vllm_config: VllmConfig,
        runner: object,
        group: CacheGroup,
        caches: Mapping[str, Tensor],
    ) -> PageSelector:
        """Allocate bounds of all pages, and let attention choose from now on; see
        :meth:`selector_refusals` first.

        Args:
            config: with a budget.
            vllm_config: of the engine.
            runner: vLLM's model runner.
            group: whose pages are chosen.
            caches: of its layers, ``[blocks, heads, slots, 2 * channels]`` each.
        """
        ...

    def attention_layers(
        self, vllm_config: VllmConfig, runner: object
    ) -> Mapping[str, CachedLayer]:
        """The attention layers of a worker's model, by name; not those of a draft model."""
        ...

    def value_refusals(self, vllm_config: VllmConfig, width: int) -> Iterator[str]:
        """Why values cannot get so many low-rank columns, each with the way out. Asked before the
        model is loaded."""
        ...

    def install_family(self, vllm_config: VllmConfig, runner: object, family: Family) -> None:
        """Let a model that has just been loaded cache the family's low-rank columns, if it has
        any, and no other adapter load into its slots. Before vLLM profiles memory or captures
        graphs."""
        ...

    def hash_by_family(self, key: str, admit: Callable[[AskedAdapter], None]) -> None:
        """Let the engine's core, which is about to make its block hasher, hash the blocks of every
        adapter's requests under a family's key in place of the adapter's name.

        Args:
            key: of the family.
            admit: is shown the adapter of each request when it arrives, and again with each block
                that it fills. What it raises at first ends the request, and nothing else.
        """
        ...

    def number_adapter(self, request: EngineRequest, number: Callable[[str], int]) -> None:
        """Let the engine know a request's adapter, if it has one, by another number than the
        request's own. Before the request is scheduled.

        Args:
            request: the engine's own object, of which this one thing is changed.
            number: of an adapter, by its name.
        """
        ...

    def expert_refusals(self, vllm_config: VllmConfig) -> Iterator[str]:
        """Why experts cannot be counted, each with the way out. Asked before the model is
        loaded."""
        ...

    def expert_routing(self, vllm_config: VllmConfig, runner: object) -> ExpertRouting:
        """Listen to the routers of a model that has just been loaded. Before vLLM profiles memory
        or captures graphs.

        Raises:
            ValueError: experts are chosen inside a kernel that tells nobody.
        """
        ...

    def padded_head_sizes(self) -> list[int]:
        """Widths of heads that the engine's attention on CPUs takes."""
        ...

    def read_schedule(self, output: SchedulerOutput) -> Scheduled:
        """What a step of vLLM's scheduler means for block tables."""
        ...

    def read_growth(self, output: SchedulerOutput) -> BlockGrowth:
        """Which blocks a step of vLLM's scheduler gives to whom, where all layers are one group. A
        resumed request's adapter is not told again."""
        ...

    def tokenizer(self, vllm_config: VllmConfig) -> Tokenizer:
        """The tokenizer that the engine uses."""
        ...

    def base_worker(self) -> type[Any]:
        """The worker class of this platform, which ours extends."""
        ...

    def read_model_memory(
        self, vllm_config: VllmConfig, heads: HeadLayout | None = None
    ) -> ModelMemory:
        """Build the model without weights, and see what it needs. Not in a process that is to run
        an engine, too.

        Args:
            vllm_config: as an engine would get it.
            heads: widths of cached heads where adapters share; the model's own if None.
        """
        ...

    def plan_cache(
        self, vllm_config: VllmConfig, model_memory: ModelMemory, kv_bytes: int
    ) -> KVCacheConfig:
        """The KV cache of one worker that has so many bytes for it; allocates nothing.

        Raises:
            ValueError: not even one request of the greatest length fits.
        """
        ...


@cache
def vllm_adapter() -> Adapter:
    """The adapter to the installed vLLM.

    Raises:
        UnsupportedVersion: there is none for it.
    """
    return cast(Adapter, import_module(ADAPTERS[check_vllm_version()]))
