"""Page selection inside vLLM's attention on CPUs.

Two places of vLLM are extended. The metadata builder, a subclass as the view's
(``attention_view``), plans a step: which requests choose, how many pages each reads, and with that
lengths and the kernel's work plan. The attention implementation keeps bounds of what it writes, and
chooses with each layer's query. The builder of the view runs first, so a table has no holes here.

A request's KV heads choose different pages, and the kernel takes one table for all of them. The
cache is head-major on CPUs (``LBHNC``), so ``[blocks, heads]`` is seen as ``[blocks * heads, 1]``,
and ``(request, KV head)`` as a request: the kernel's work is the same, and so are its results.

GPUs are refused: their graphs want all of this inside the step (``page_kernels``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import subclass_attention_backend
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from memshare.config import SelectionConfig
from memshare.core.token_map import TokenMap
from memshare.engine.vllm_0_32.attention_layers import layers_of
from memshare.engine.vllm_0_32.view.attention_view import full_layers, numbers_by_row
from memshare.kv.layout import KVLayout
from memshare.mechanisms.selection.bounds import PageBounds, PageWrites
from memshare.mechanisms.selection.choice import PageChooser, Plan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata

Mask = npt.NDArray[np.bool_]


@dataclass
class SelectedMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a step, with what is selected.

    Attributes:
        step: None where nothing may be: in dummy runs.
    """

    step: SelectedStep | None = None


@dataclass
class SelectedStep:
    """How the requests of a step are read in the layers that choose.

    Attributes:
        there: pages of all requests that generate.
        read: those of them that each KV head reads.
        plan: of the requests that choose; None if none does.
        chosen: what the kernel is given for them; its table is filled in by each layer.
        chosen_tokens: their tokens in the step; None if these are all.
        rest: what the kernel is given for the other requests; None if there are none.
        rest_tokens: their tokens in the step.
    """

    there: int
    read: int
    plan: Plan | None = None
    chosen: CPUAttentionMetadata | None = None
    chosen_tokens: Tensor | None = None
    rest: CPUAttentionMetadata | None = None
    rest_tokens: Tensor | None = None


class SelectingBuilder:
    """Marks a metadata builder that plans selections; ``selector`` is None until it is attached."""

    selector: CPUPageSelector | None = None


@functools.cache  # vLLM groups layers by their backend's class
def with_selection(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The same backend, whose builder plans selections."""
    base: Any = backend.get_builder_cls()

    class Builder(SelectingBuilder, base):  # type: ignore[misc]
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            *args: Any,
            **kwargs: Any,
        ) -> CPUAttentionMetadata:
            built = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            if self.selector is None or common_attn_metadata.is_prefilling is None:
                return cast(CPUAttentionMetadata, built)
            step = self.selector.plan(common_attn_metadata, built, self)
            return SelectedMetadata(**vars(built), step=step)

        def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
            return (
                False  # it would read a common prefix once for requests that choose for themselves
            )

    return subclass_attention_backend("Selecting", backend, cast(Any, Builder))


class SelectingImpl(CPUAttentionBackendImpl):
    """vLLM's attention, which keeps bounds of the pages that it writes, and reads those chosen.

    A layer's own implementation changes its class to this once the cache is there.

    Attributes:
        selector: of the rank.
        bounds: of the layer whose cache this one reads; None if this layer reads everything.
    """

    selector: CPUPageSelector
    bounds: PageBounds | None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """As vLLM's; the bounds take in the same keys."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        # KVLayout finds out about a cache's layout by writing into another one.
        if self.bounds is not None and kv_cache is cast(Any, layer).kv_cache:
            writes = self.selector.writes(slot_mapping)
            self.bounds.write(key[: len(slot_mapping)], writes)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As vLLM's; where the step has a plan, requests that choose read what this layer's query
        makes them choose."""
        step = attn_metadata.step if isinstance(attn_metadata, SelectedMetadata) else None
        if step is not None:
            self.selector.count(step, chooses=self.bounds is not None)
        if step is None or step.plan is None or self.bounds is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        if step.chosen_tokens is None:
            tokens = step.plan.requests
            self._read_chosen(layer, query[:tokens], kv_cache, step, output[:tokens])
            return output
        own = query.index_select(0, step.chosen_tokens)
        read = torch.empty_like(own)
        self._read_chosen(layer, own, kv_cache, step, read)
        output.index_copy_(0, step.chosen_tokens, read)
        rest_tokens = cast(Tensor, step.rest_tokens)
        others = query.index_select(0, rest_tokens)
        read = torch.empty_like(others)
        super().forward(layer, others, key, value, kv_cache, step.rest, read)
        output.index_copy_(0, rest_tokens, read)
        return output

    def _read_chosen(
        self, layer: Any, query: Tensor, kv_cache: Tensor, step: SelectedStep, output: Tensor
    ) -> None:
        """Attention of requests that choose, one token each: ``[requests, heads, channels]``."""
        assert step.plan is not None
        assert step.chosen is not None
        assert self.bounds is not None
        table = self.selector.chooser.choose(step.plan, query, self.bounds)
        step.chosen.block_table = table
        rows = (len(table), self.num_queries_per_kv, query.shape[-1])
        by_head = kv_cache.view(-1, 1, *kv_cache.shape[2:])
        nothing = query[:0]  # what is new is in the cache
        super().forward(
            layer, query.reshape(rows), nothing, nothing, by_head, step.chosen, output.view(rows)
        )


class CPUPageSelector:
    """:class:`~memshare.core.interfaces.PageSelector` of a rank whose attention runs on a CPU.

    Attributes:
        chooser: of all layers.
    """

    def __init__(
        self,
        config: SelectionConfig,
        runner: object,
        caches: Mapping[str, Tensor],
        vllm_config: VllmConfig,
        block_size: int,
    ) -> None:
        """Allocate bounds, and let attention keep them.

        Args:
            config: with a budget.
            runner: vLLM's model runner; its caches are there.
            caches: ``[blocks, heads, slots, 2 * channels]`` of each layer that has one.
            vllm_config: of the engine.
            block_size: token slots in one of the engine's blocks.
        """
        self._runner = runner
        self._vllm_config = vllm_config
        self._caches = caches
        cache = next(iter(caches.values()))
        self._page_size = cache.shape[2]
        self._split = block_size // self._page_size
        self.chooser = PageChooser(config, cache.shape[1], self._page_size, cache.shape[0])
        self._bounds: dict[str, PageBounds] = {}
        for name, cache in caches.items():
            if extract_layer_index(name) >= config.exempt_layers:
                pages, heads, _, width = cache.shape
                self._bounds[name] = PageBounds(pages, heads, width // 2, cache.dtype, cache.device)
        for layer in full_layers(vllm_config):
            owner = layer.kv_sharing_target_layer_name or layer.layer_name
            layer.impl.__class__ = SelectingImpl
            impl = cast(SelectingImpl, layer.impl)
            exempt = extract_layer_index(layer.layer_name) < config.exempt_layers
            impl.selector, impl.bounds = self, None if exempt else self._bounds.get(owner)
        self._layouts: list[KVLayout] | None = None
        self._exact: Set[str] = frozenset()
        self._writes: tuple[object, PageWrites] | None = None
        self._read = self._there = 0

    @property
    def nbytes(self) -> int:
        """What the bounds take."""
        return sum(bounds.highs.nbytes for bounds in self._bounds.values())

    def read_all(self, requests: Set[str]) -> None:
        """See :meth:`PageSelector.read_all`."""
        self._exact = requests

    def clear(self) -> None:
        """See :meth:`PageSelector.clear`."""
        self._exact = frozenset()
        self._writes = None

    @torch.inference_mode()
    def rewritten(self, blocks: Tensor) -> None:
        """See :meth:`PageSelector.rewritten`."""
        if self._layouts is None:
            known = layers_of(self._vllm_config, cast(Any, self._runner).get_model())
            self._layouts = [
                KVLayout.learn(known[name], self._caches[name]) for name in self._bounds
            ]
        if self._split > 1:  # a page is a part of one of the engine's blocks
            blocks = (blocks[:, None] * self._split + torch.arange(self._split)).flatten()
        self.chooser.changes(blocks.numpy())
        for (name, bounds), layout in zip(self._bounds.items(), self._layouts, strict=True):
            keys, _ = layout.gather(self._caches[name], blocks)
            bounds.rebuild(blocks, keys)

    def take_counts(self) -> tuple[int, int]:
        """See :meth:`PageSelector.take_counts`."""
        counts = self._read, self._there
        self._read = self._there = 0
        return counts

    def count(self, step: SelectedStep, chooses: bool) -> None:
        """A layer reads this step."""
        heads = self.chooser.heads
        self._there += step.there * heads
        self._read += (step.read if chooses else step.there) * heads

    def writes(self, slots: Tensor) -> PageWrites:
        """Where the tokens of the step that runs now go; worked out for its first layer."""
        context = get_forward_context()
        if self._writes is None or self._writes[0] is not context:
            self._writes = context, PageWrites.of(slots.numpy(), self._page_size)
            self._changes(slots)
        return self._writes[1]

    def _changes(self, slots: Tensor) -> None:
        written = slots.numpy()
        self.chooser.changes(TokenMap(self._page_size).entry(written[written >= 0]))

    def plan(
        self, batch: CommonAttentionMetadata, built: CPUAttentionMetadata, builder: Any
    ) -> SelectedStep:
        """Plan a step.

        Args:
            batch: as the engine has it.
            built: vLLM's metadata of it, without holes.
            builder: that made it.
        """
        self._changes(built.slot_mapping)
        rows = batch.num_reqs
        starts = batch.query_start_loc_cpu.numpy()[: rows + 1]
        lens = built.seq_lens.numpy()[:rows]
        generates: Mask = (np.diff(starts) == 1) & ~cast(Tensor, batch.is_prefilling).numpy()[:rows]
        pages = self.chooser.pages(lens)
        read = self.chooser.pages_read(lens)
        chooses = generates & (read < pages)
        if self._exact:
            named = numbers_by_row(self._runner, batch, dict.fromkeys(self._exact, 1))
            chooses &= named == 0
        there = int(pages[generates].sum())
        if not chooses.any():
            return SelectedStep(there, there)
        step = SelectedStep(there, there - int((pages - read)[chooses].sum()))
        every = bool(chooses.all())
        which = torch.from_numpy(np.flatnonzero(chooses))
        table = built.block_table if every else built.block_table.index_select(0, which)
        step.plan = self.chooser.begin(table[:rows], lens[chooses])
        heads = builder.num_heads // builder.num_kv_heads, 1
        step.chosen = _metadata(
            built, step.plan.lens, torch.arange(len(step.plan.lens) + 1, dtype=torch.int32),
            built.block_table, builder, heads,
        )  # fmt: skip
        if every:
            return step
        step.chosen_tokens = torch.from_numpy(starts[:-1][chooses].astype(np.int64))
        others = np.flatnonzero(~chooses)
        queries = np.diff(starts)[others]
        of_others = np.repeat(~chooses, np.diff(starts))
        step.rest_tokens = torch.from_numpy(np.flatnonzero(of_others))
        loc = torch.from_numpy(np.concatenate(([0], np.cumsum(queries))).astype(np.int32))
        index = torch.from_numpy(others)
        step.rest = _metadata(
            built, built.seq_lens.index_select(0, index), loc,
            built.block_table.index_select(0, index), builder,
            (builder.num_heads, builder.num_kv_heads),
        )  # fmt: skip
        return step


def _metadata(
    built: CPUAttentionMetadata,
    lens: Tensor,
    starts: Tensor,
    table: Tensor,
    builder: Any,
    heads: tuple[int, int],
) -> CPUAttentionMetadata:
    """vLLM's metadata for other rows, as ``CPUAttentionMetadataBuilder.build`` makes it."""
    work = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lens),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=builder.head_dim,
        seq_lens=lens,
        dtype=builder.dtype,
        query_start_loc=starts,
        causal=built.causal,
        sliding_window_size=builder.window_size,
        isa=builder.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=builder.kv_cache_dtype,
    )
    return replace(
        built,
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
        query_start_loc=starts,
        max_seq_len=int(lens.max()),
        seq_lens=lens,
        block_table=table,
        scheduler_metadata=work,
    )
