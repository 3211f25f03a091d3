"""What hybrid models gain under KV pressure: counts of vLLM's real scheduler, free of noise.

    python -m tools.bench.hybrids.schedule

Like ``tools.bench.schedule``, with the KV cache groups of a plain model, of one with sliding
windows of 128 tokens beside full attention in equal parts (as gpt-oss), and of one with three
groups of linear attention to one full one, in blocks of 544 tokens (as Qwen3-Next). Memory is for a
third of the requests at full length, of all layers.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memshare.core.footprint import Footprint, SideGroup
from memshare.core.token_map import TokenMap
from memshare.lab.bench.arms import POLICIES
from memshare.lab.markdown import table_head
from tools.bench.schedule import (
    BLOCK,
    DENSE,
    HEADS,
    PROMPT,
    ScheduledRequest,
    ScheduleWorkload,
    of_texts,
    reasoner_folder,
    row_of,
    run,
    tiny_folder,
)

STATE_BLOCK = 544  # tokens: the least that vLLM makes of Qwen3-Next's layers
KINDS: dict[str, dict[str, int]] = {
    "plain": {"block_size": BLOCK},
    "gpt-oss": {"block_size": BLOCK, "window": 128},
    "Qwen3-Next": {"block_size": STATE_BLOCK, "states": 3},
}
ARMS = ("oldest", "random", "twins", "compaction")
PART = 3  # of the requests' memory there is one


def footprint(kind: dict[str, int]) -> Footprint:
    """Blocks of a request of such a model."""
    size = kind["block_size"]
    beside = [SideGroup(size, kind["window"])] if "window" in kind else []
    beside += [SideGroup(size, 2)] * kind.get("states", 0)
    return Footprint(TokenMap(size), tuple(beside))


def with_memory(name: str, jobs: list[ScheduledRequest], kind: dict[str, int]) -> ScheduleWorkload:
    """The requests, and memory for a third of them."""
    of = footprint(kind)
    need = sum(of.blocks(len(job.prompt) + job.length) for job in jobs)
    return ScheduleWorkload(name, jobs, need // PART)


def workloads(kind: dict[str, int]) -> Iterator[tuple[Path | None, ScheduleWorkload]]:
    """Yield each with the model whose texts it writes; None: random tokens."""
    draw = random.Random(0)
    long = 8_000 if "states" in kind else 1_400
    lengths = [draw.randrange(long // 8, long) for _ in range(24)]
    jobs = [
        ScheduledRequest([draw.randrange(200) for _ in range(PROMPT)], length) for length in lengths
    ]
    yield None, with_memory(f"24 x {long // 8:,}-{long:,} random tokens", jobs, kind)
    if "states" not in kind:  # a solution is shorter than two of its blocks
        reasoner = reasoner_folder()
        texts = of_texts(reasoner, "solutions", 48, 1100, 16)
        yield reasoner, with_memory("48 solutions of up to 1,100 tokens", texts.jobs, kind)


def main() -> None:
    """Print one table a kind and workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="all, if none is named")
    parser.add_argument("--arm", choices=ARMS, action="append", help="all, if none is named")
    chosen = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_folder(Path(folder))
        for name in chosen.kind or KINDS:
            kind = KINDS[name]
            for reasoner, work in workloads(kind):
                print(f"\n{name}-like: {work.name}; {work.blocks} usable blocks:\n")
                print(table_head(HEADS))
                model = reasoner or tiny
                base = run(model, work, DENSE, **kind)
                print(row_of("dense", base, base), flush=True)
                for arm in chosen.arm or ARMS:
                    if arm == "twins" and reasoner is None:
                        continue  # random tokens have none
                    options: dict[str, Any] = POLICIES[arm]
                    print(row_of(f"`{arm}`", run(model, work, options, **kind), base), flush=True)


if __name__ == "__main__":
    main()
