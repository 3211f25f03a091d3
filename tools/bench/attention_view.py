"""What compaction costs on a worker: hiding holes from attention, and packing tokens.

On tensors of the real shapes, on a GPU if there is one; and, if a model is named, in its engine.

    python -m tools.bench.attention_view
    python -m tools.bench.attention_view --model smollm2-135m
    python -m tools.bench.attention_view --parts decode --model smollm2-135m --dtype bfloat16

``build`` is the work before a backend builds its metadata, for 256 requests of 1000 entries.
``pack`` is one round on a worker: reading and scoring what is new, choosing, moving. ``decode``
compares steps of one batch before and after it has lost half of its context; most of its time is
the prefill. ``--parts`` leaves out the rest. ``--dtype bfloat16`` reads faster where there is AMX.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from memshare.core.token_map import TokenMap
from memshare.engine.vllm_0_32.view.attention_view import SqueezedTables
from memshare.kv.rotary import Rotation
from memshare.lab.markdown import table_head, table_row
from memshare.mechanisms.compaction.messages import CompactionCommands, Packing
from memshare.mechanisms.compaction.probe.network import ProbeNetwork, fast_dtype
from memshare.mechanisms.compaction.scorers.probe import ProbeScorer
from memshare.mechanisms.compaction.worker import CompactionWorkerPart
from memshare.mechanisms.contract import WorkerContext

REQUESTS, ENTRIES, SLOTS = 256, 1000, 16


@dataclass(frozen=True)
class Shape:
    """A model's KV cache."""

    name: str
    layers: int
    heads: int
    channels: int
    dtype: torch.dtype


SHAPES = (
    Shape("135M", 30, 3, 64, torch.float32),
    Shape("1.1B", 22, 4, 64, torch.bfloat16),
    Shape("8B", 32, 8, 128, torch.bfloat16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default="build,pack,decode", help="separated by commas")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--model", help="measure decode steps of this model, too")
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="decode: steps of each kind")
    parser.add_argument("--dtype", default="float32", help="decode: of the model")
    args = parser.parse_args()
    repeats = args.repeats
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"{device.type}, {torch.get_num_threads()} threads, load {load:.1f} per core\n")
    parts = args.parts.split(",")
    if "build" in parts:
        print(table_head(("build", "median ms", "best ms")))
        for name, rows in (("nobody has holes", 0), ("16 rows", 16), ("all rows", REQUESTS)):
            print(table_row((name, *measure(build(rows, device), device, repeats))), flush=True)
        print()
    if "pack" in parts:
        print(table_head(("pack, model", "tokens", "freed", "median ms", "best ms")))
        for shape in SHAPES:
            for packing in (2, 8, 62, 125):
                step = pack(shape, packing, device)
                times = measure(step, device, max(3, repeats // packing))
                dropped = packing // 2
                print(table_row((shape.name, f"{packing * 32}", f"{dropped}", *times)), flush=True)
        print()
    if "decode" in parts and args.model:
        whole, half = decode(args.model, args.context, args.batch, args.dtype, args.steps)
        print(table_head(("decode", "context", "batch", "whole ms", "half ms", "steps per second")))
        gains = [a / b for a, b in zip(quartiles(whole), quartiles(half), strict=True)]
        cells = (
            f"{args.model}, {args.dtype}",
            f"{args.context}",
            f"{args.batch}",
            *(" / ".join(f"{each:.1f}" for each in quartiles(times)) for times in (whole, half)),
            " / ".join(f"{gain:.2f}x" for gain in gains),
        )
        print(table_row(cells))
        print("\nlower quartile / median / upper quartile of the steps' times, and their ratios")


def quartiles(times: list[float]) -> list[float]:
    return statistics.quantiles(times, n=4)


def measure(step: Callable[[], object], device: torch.device, repeats: int) -> tuple[str, str]:
    """Median and best milliseconds of a step: of CPU time, which what else runs does not lengthen;
    on a GPU from call to end."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats + 2):
        start = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((clock() - start) * 1e3)
    return f"{statistics.median(times[2:]):.3f}", f"{min(times[2:]):.3f}"


def build(rows: int, device: torch.device) -> Callable[[], object]:
    """The view of a batch in which some rows have lost half of their entries, from one step to the
    next: every row grows by a token, one in sixteen of them by an entry."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    rng = np.random.default_rng(0)
    table = rng.integers(1, 60000, (REQUESTS, ENTRIES)).astype(np.int32)
    counts = np.zeros(REQUESTS, np.int32)
    for row in range(0, REQUESTS, REQUESTS // rows) if rows else ():
        table[row, rng.choice(ENTRIES - 1, ENTRIES // 2, replace=False)] = 0
        counts[row] = ENTRIES // 2
    longest = ENTRIES * SLOTS
    lens = (longest - 200 - torch.arange(REQUESTS) % SLOTS).int()
    starts = torch.arange(REQUESTS + 1, dtype=torch.int32)
    batch = CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lens.to(device),
        num_reqs=REQUESTS,
        num_actual_tokens=REQUESTS,
        max_query_len=1,
        max_seq_len=longest,
        block_table_tensor=torch.from_numpy(table).to(device),
        slot_mapping=torch.zeros(REQUESTS, dtype=torch.int64, device=device),
        seq_lens_cpu_upper_bound=lens,
    )
    tables = SqueezedTables(REQUESTS, ENTRIES, SLOTS, device, captured=False)
    grown = batch.seq_lens

    def step() -> None:
        grown.add_(1).clamp_(max=longest)
        tables.view(batch, counts if rows else None, 1)

    return step


class BenchLayer:
    """A layer that stores K and V as vLLM's backends do: on CPUs by the kernel of the instruction
    set that vLLM chooses, on GPUs side by side."""

    cache_dtype = "auto"
    scales = (1.0, 1.0)
    rotary = None

    def __init__(self, shape: Shape) -> None:
        self.head_size, self.dtype = shape.channels, shape.dtype

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        blocks, heads, size, _ = cache.shape
        if cache.device.type != "cpu":
            places = TokenMap(size)
            cache[places.entry(slots), :, places.slot(slots)] = torch.cat((keys, values), -1)
            return
        from vllm import _custom_ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        halves = cache.view(blocks, heads, 2 * size, -1).chunk(2, 2)
        isa = _get_attn_isa(self.dtype, size, self.head_size)
        _custom_ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)


def pack(shape: Shape, entries: int, device: torch.device) -> Callable[[], object]:
    """One round that frees half of some entries of 32 tokens, none of them packed before."""
    size = (shape.layers, entries + 1, shape.heads, 32, 2 * shape.channels)
    memory = torch.randn(size, device=device).to(shape.dtype)
    names = [f"layer.{index}" for index in range(shape.layers)]
    tables: Any = SimpleNamespace(repoint=lambda *args: True)
    view: Any = SimpleNamespace(leave_out=lambda holes: None)
    context = WorkerContext(
        config=None,  # type: ignore[arg-type]
        tables=tables,
        token_map=TokenMap(32),
        layers=dict.fromkeys(names, BenchLayer(shape)),
        caches=dict(zip(names, memory, strict=True)),
        view=view,
    )
    part = CompactionWorkerPart(context, _Random())
    part._scorer = probe(shape, device)
    packing = Packing("r", tuple(range(entries)), tuple(range(1, entries + 1)), entries // 2)
    commands = CompactionCommands((packing,), {"r": entries - entries // 2}, ended=("r",))
    return lambda: part.before_step(commands)


def probe(shape: Shape, device: torch.device) -> ProbeScorer:
    """A probe of the shape of those that ship; what its weights are costs nothing."""
    sizes = ProbeNetwork.names_and_shapes(
        shape.layers, shape.heads, shape.heads, shape.channels, hidden=96
    )
    network = ProbeNetwork({name: torch.randn(size) for name, size in sizes.items()}, 2)
    angles = torch.arange(8192)[:, None] * 1e4 ** -torch.linspace(0, 1, shape.channels // 2)
    rotation = Rotation(angles.cos(), angles.sin(), neox=True).to(device)
    part = network.part(0, shape.heads, device, fast_dtype(device))
    return ProbeScorer(part, rotation, reach=2)


def decode(
    model: str, context: int, batch: int, dtype: str, steps: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each step before and after all requests have lost half of their context.

    The worker is told so by hand; the scheduler keeps the blocks, of which there are enough.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "8")
    from vllm import LLM, SamplingParams

    from memshare.plug_in import plug_in
    from memshare.small_model.names import resolve_model

    memshare = {"policy": {"name": "compaction", "scorer": "random"}}
    llm = LLM(
        resolve_model(model), dtype=dtype, max_model_len=context + 512, block_size=32,
        max_num_seqs=batch, max_num_batched_tokens=2048, enforce_eager=True,
        num_gpu_blocks_override=batch * (context // 32 + 17), enable_prefix_caching=False,
        disable_log_stats=True, **plug_in(memshare),
    )  # fmt: skip
    engine: Any = llm.llm_engine
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    params = SamplingParams(temperature=0, max_tokens=2 * steps + 40, ignore_eos=True)
    rng = np.random.default_rng(0)
    for name in range(batch):
        prompt = rng.integers(10, 40000, context).tolist()
        engine.add_request(str(name), {"prompt_token_ids": prompt}, params)
    requests = core.scheduler.requests
    while any(request.num_computed_tokens < context for request in requests.values()):
        engine.step()
    whole = _steps(engine, steps)
    side, part = worker._memshare, worker._memshare.parts["compaction"]
    entries = tuple(range(context // 32 - 2))
    tables = core.scheduler.connector.scheduler_side.tables
    packings = tuple(
        Packing(name, entries, tuple(tables.block_ids()[name][: len(entries)]), len(entries) // 2)
        for name in requests
    )
    holes = dict.fromkeys(requests, len(entries) - len(entries) // 2)
    pending = [CompactionCommands(packings, holes)]
    before_step = side.before_step

    def with_holes(message: Any) -> None:
        before_step(message)
        part.before_step(pending.pop() if pending else CompactionCommands(holes=holes))

    side.before_step = with_holes
    engine.step()
    return whole, _steps(engine, steps)


def _steps(engine: Any, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - start) * 1e3)
    return times


class _Random:
    scorer, seed, probe, position_weight = "random", 0, None, 0.7


if __name__ == "__main__":
    main()
