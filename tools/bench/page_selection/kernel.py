"""One decode step's attention on tensors of real shapes, layer by layer: no engine, seconds to run.

CPU time of the process, as in ``timing``. Layers take turns, so that no cache holds their pages.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, _get_attn_isa

from memshare.config import SelectionConfig
from memshare.engine.vllm_0_32.view.selecting import SelectedStep, SelectingImpl
from memshare.lab.markdown import table_head, table_row
from memshare.mechanisms.selection.bounds import PageBounds, PageWrites
from memshare.mechanisms.selection.choice import PageChooser
from tools.bench.page_selection.engine import PAGE


@dataclass(frozen=True)
class Shape:
    """Attention of a model."""

    name: str
    heads: int
    group: int
    channels: int
    dtype: torch.dtype


SHAPES = (
    Shape("135M, float32", 3, 3, 64, torch.float32),
    Shape("8B, bfloat16", 8, 4, 128, torch.bfloat16),
)
_LAYERS = 3


class Layer:
    """A layer's cache, filled at random, with bounds, and vLLM's attention on it."""

    def __init__(self, shape: Shape, table: Tensor, chooser: PageChooser) -> None:
        pages = int(table.max()) + 1
        size = (pages, shape.heads, PAGE, 2 * shape.channels)
        self.cache = torch.randn(size).to(shape.dtype)
        self.isa = _get_attn_isa(shape.dtype, PAGE, shape.channels)
        self.kv_cache, self._k_scale_float, self._v_scale_float = self.cache, 1.0, 1.0
        bounds = PageBounds(pages, shape.heads, shape.channels, shape.dtype, torch.device("cpu"))
        bounds.highs.normal_()
        self.impl = SelectingImpl.__new__(SelectingImpl)
        self.impl.__dict__.update(
            num_heads=shape.heads * shape.group, num_kv_heads=shape.heads, attn_type="decoder",
            num_queries_per_kv=shape.group, scale=shape.channels**-0.5, alibi_slopes=None,
            sliding_window=-1, logits_soft_cap=0, sinks=None, kv_cache_dtype="auto", bounds=bounds,
            selector=SimpleNamespace(chooser=chooser, count=lambda step, chooses: None),
        )  # fmt: skip


def measure_kernel(context: int, batches: list[int], budget: float, repeats: int) -> None:
    """Print milliseconds of one layer: medians, and what choosing is of full attention."""
    heads = (
        "attention", "requests", "all pages ms", "best pages ms", "ratio", "of it choosing",
        "bounds of a step", "planning, once a step", "choosing and bounds, of all pages",
    )  # fmt: skip
    print(table_head(heads))
    for shape in SHAPES:
        for batch in batches:
            print(table_row(_row(shape, context, batch, budget, repeats)), flush=True)


def _row(shape: Shape, context: int, batch: int, budget: float, repeats: int) -> list[str]:
    width = -(-context // PAGE)
    table = torch.randperm(batch * width).view(batch, width).int()
    chooser = PageChooser(SelectionConfig(budget=budget), shape.heads, PAGE, batch * width)
    layers = [Layer(shape, table, chooser) for _ in range(_LAYERS)]
    lens = np.full(batch, context, np.int32)
    plan = chooser.begin(table, lens)
    chosen = _metadata(shape, plan.lens, table, (shape.group, 1), layers[0].isa)
    heads = shape.heads * shape.group, shape.heads
    whole = _metadata(shape, torch.from_numpy(lens), table, heads, layers[0].isa)
    step = SelectedStep(0, 0, plan, chosen)
    queries = torch.randn(batch, shape.heads * shape.group, shape.channels).to(shape.dtype)
    keys = torch.randn(batch, shape.heads, shape.channels).to(shape.dtype)
    slots = (table[:, -1].long() * PAGE + PAGE - 2).numpy()
    output, nothing = torch.empty_like(queries), queries[:0]

    def everything(layer: Any) -> None:
        layer.impl.forward(layer, queries, nothing, nothing, layer.cache, whole, output)

    def best(layer: Any) -> None:
        layer.impl._read_chosen(layer, queries, layer.cache, step, output)

    planner = PageChooser(SelectionConfig(budget=budget), shape.heads, PAGE, batch * width)
    writes = PageWrites.of(slots, PAGE)
    calls: tuple[Callable[[Any], object], ...] = (
        everything,
        lambda layer: chooser.choose(plan, queries, layer.impl.bounds),
        best,
        lambda layer: layer.impl.bounds.write(keys, writes),
        lambda layer: (planner.begin(table, lens), PageWrites.of(slots, PAGE)),
    )
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, spent in zip(calls, times, strict=True):  # in turns
            for layer in layers:
                start = time.process_time()
                call(layer)
                spent.append((time.process_time() - start) * 1e3)
        chooser.changes(table[:, -1].numpy())
        plan = chooser.begin(table, lens)
        step.plan = plan
    full, choosing, few, write, begin = (statistics.median(spent[_LAYERS:]) for spent in times)
    numbers = [f"{full:.3f}", f"{few:.3f}", f"{full / few:.2f}x", f"{choosing:.3f}"]
    cost = f"{(choosing + write) / full:.1%}"
    return [shape.name, str(batch), *numbers, f"{write:.3f}", f"{begin:.3f}", cost]


def _metadata(
    shape: Shape, lens: Tensor, table: Tensor, heads: tuple[int, int], isa: str
) -> CPUAttentionMetadata:
    starts = torch.arange(len(lens) + 1, dtype=torch.int32)
    work = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lens), num_heads=heads[0], num_kv_heads=heads[1], head_dim=shape.channels,
        seq_lens=lens, dtype=shape.dtype, query_start_loc=starts, causal=True,
        sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    return CPUAttentionMetadata(len(lens), 1, starts, int(lens.max()), lens, table, lens, work)
