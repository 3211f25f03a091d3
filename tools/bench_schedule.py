"""What vLLM's scheduler does under KV pressure, with and without MemShare: counts, free of noise.

vLLM's real scheduler, block pool and cache manager run; the model is a stand-in
(memshare/simulate/rig.py), so a run takes seconds and gives the same numbers everywhere. Which
blocks are alike is not known without a model, so only the policies that need not know take part.

    python tools/bench_schedule.py
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = 45  # tokens
SHARE = {"policy": {"name": "oldest"}}
UNHELD = {"admission": {"lookahead_tokens": 0}}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"mode": "off"},
    "nothing but admission": SHARE | {"budget": {"max_shared_fraction": 0.0}},
    "`oldest`, admission by vLLM": SHARE | UNHELD,
    "`oldest`": SHARE,
    "`random`": {"policy": {"name": "random"}},
}


@dataclass(frozen=True)
class Workload:
    """Requests by output length in tokens and the engine step in which they arrive."""

    name: str
    lengths: list[int]
    arrivals: list[int]
    blocks: int
    """KV blocks, the null block included."""


@dataclass(frozen=True)
class Counts:
    """What one run did."""

    steps: int
    tokens: int
    preemptions: int
    recomputed: int
    remaps: int


def workloads() -> list[Workload]:
    """Memory for a third of the requests, or of 32 of them, at full length."""
    rng = random.Random(1)
    mixed = [rng.randrange(200, 1400) for _ in range(64)]
    spread = sorted(rng.randrange(3000) for _ in mixed)
    return [
        Workload("24 x 400 tokens, all at once", [400] * 24, [0] * 24, 110),
        Workload("24 x 800 tokens, all at once", [800] * 24, [0] * 24, 217),
        Workload("64 x 200-1400 tokens, all at once", mixed, [0] * 64, 289),
        Workload("64 x 200-1400 tokens, over 3,000 steps", mixed, spread, 289),
    ]


def main() -> None:
    """Print one table a workload."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from tests.engine.harness import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder))
        for work in workloads():
            print(f"\n{work.name}; {work.blocks - 1} usable blocks:\n")
            print("| arm | steps | tokens a step | preemptions | recomputed tokens | remaps |")
            print("| --- | --- | --- | --- | --- | --- |")
            base = run(model, work, ARMS["dense"])
            for arm, options in ARMS.items():
                print(_row(arm, run(model, work, options), base), flush=True)


def run(model: Path, work: Workload, options: dict[str, Any]) -> Counts:
    """Run a workload to its end."""
    from memshare.simulate.rig import Rig

    rig = Rig(model, options, work.blocks, max_num_seqs=256)
    rng = random.Random(0)
    steps = preemptions = computed = added = 0
    while added < len(work.lengths) or rig.scheduler.requests:
        while added < len(work.lengths) and work.arrivals[added] <= steps:
            prompt = [rng.randrange(200) for _ in range(PROMPT)]
            rig.add(f"r{added}", prompt, work.lengths[added])
            added += 1
        output = rig.step()
        steps += 1
        preemptions += len(output.preempted_req_ids or ())
        computed += output.total_num_scheduled_tokens
    remaps = rig.side.journal.tally.totals["applied"] if rig.side is not None else 0
    rig.close()
    once = sum(PROMPT + length - 1 for length in work.lengths)
    return Counts(steps, sum(work.lengths), preemptions, computed - once, remaps)


def _row(arm: str, mine: Counts, base: Counts) -> str:
    speed = mine.tokens / mine.steps
    cells = (
        arm,
        str(mine.steps),
        f"{speed:.1f} ({speed / (base.tokens / base.steps):.2f}x)",
        f"{mine.preemptions} ({mine.preemptions / max(1, base.preemptions):.2f}x)",
        f"{mine.recomputed} ({mine.recomputed / max(1, base.recomputed):.2f}x)",
        str(mine.remaps),
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
