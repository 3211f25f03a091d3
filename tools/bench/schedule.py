"""What vLLM's scheduler does under KV pressure, with and without MemShare: counts, free of noise.

vLLM's real scheduler, block pool and cache manager run with MemShare's real connector; the model is
a stand-in (memshare/lab/simulate/harness.py), so a run takes seconds and gives the same numbers
everywhere.

    python -m tools.bench.schedule
    python -m tools.bench.schedule --texts solutions
    python -m tools.bench.schedule --limits
    python -m tools.bench.schedule --lookahead 0,96,192,384
    python -m tools.bench.schedule --kept 512,1024,2048

The first has requests of given lengths that write random tokens: `oldest` and `random` need not
know what is alike, and `twins` finds nothing. The second writes real texts: stage one runs; how
similar the KV of two equal tokens is, no model says, and a random number from 0 to 1 stands for it.
The third has both, for `compaction` alone, with several limits of what a request may lose; the
others the same, with its default limits, and several numbers of tokens that admission looks ahead
or that a request keeps.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memshare.core.token_map import TokenMap
from memshare.lab.bench.arms import POLICIES
from memshare.lab.markdown import table_head, table_row

PROMPT = 45  # tokens
BLOCK = 32  # tokens
HEADS = (
    "arm", "steps", "tokens per step", "preemptions", "recomputed tokens", "remaps or rounds",
    "given up",
)  # fmt: skip
DENSE: dict[str, Any] = {"mode": "off"}
WATERMARK = 0.05  # vLLM's own, in the arm that has one
SHARE = POLICIES["oldest"]
COMPACTION = POLICIES["compaction"]
UNHELD = {"admission": {"lookahead_tokens": 0}}
ARMS: dict[str, dict[str, Any]] = {
    "nothing but admission": SHARE | {"budget": {"max_shared_fraction": 0.0}},
    "`oldest`, admission by vLLM": SHARE | UNHELD,
    "`oldest`": SHARE,
    "`random`": POLICIES["random"],
    "`twins`": POLICIES["twins"],
    "`compaction`, admission by vLLM": COMPACTION | UNHELD,
    "`compaction`": COMPACTION,
}

LIMITS = (
    (0.4, 0.8, 32), (0.5, 0.8, 128), (0.6, 0.8, 128), (0.75, 0.8, 128), (0.6, 0.8, 64),
    (0.5, 0.8, 32), (0.6, 0.8, 32), (0.5, 0.7, 32),
)  # fmt: skip
"""Of `compaction`: ``max_dropped_fraction``, ``max_thinning``, ``recent_tokens``."""


@dataclass(frozen=True)
class ScheduledRequest:
    """A request.

    Attributes:
        arrival: engine step.
        forced: the tokens that it writes; None: any.
    """

    prompt: list[int]
    length: int
    arrival: int = 0
    forced: list[int] | None = None


@dataclass(frozen=True)
class ScheduleWorkload:
    """Requests, in the order of their arrivals, and KV memory for them."""

    name: str
    jobs: list[ScheduledRequest]
    blocks: int
    """Usable KV blocks."""


@dataclass(frozen=True)
class ScheduleCounts:
    """What one run did."""

    steps: int
    tokens: int
    preemptions: int
    early: int
    """Preemptions before any request had ended."""
    recomputed: int
    remaps: int
    """Remaps, or rounds of compaction."""
    given_up: float
    """Fraction of each request's full blocks when it ended, mean."""


def of_lengths() -> Iterator[ScheduleWorkload]:
    """Yield workloads with memory for a third of the requests, or for eight to ten of them."""
    rng = random.Random(1)
    mixed = [rng.randrange(200, 1400) for _ in range(64)]
    spread = sorted(rng.randrange(3000) for _ in mixed)
    for name, lengths, arrivals, blocks in (
        ("24 x 400 tokens, all at once", [400] * 24, [0] * 24, 109),
        ("24 x 800 tokens, all at once", [800] * 24, [0] * 24, 216),
        ("64 x 200-1400 tokens, all at once", mixed, [0] * 64, 288),
        ("64 x 200-1400 tokens, over 3,000 steps", mixed, spread, 288),
        ("48 x 4,000 tokens, all at once", [4000] * 48, [0] * 48, 1016),
    ):
        draw = random.Random(0)
        prompts = ([draw.randrange(200) for _ in range(PROMPT)] for _ in lengths)
        yield ScheduleWorkload(
            name, list(map(ScheduledRequest, prompts, lengths, arrivals)), blocks
        )


def of_texts(
    model: Path, texts: str, requests: int, tokens: int, fit: int, traces: Path | None = None
) -> ScheduleWorkload:
    """A workload of texts; memory for ``fit`` of the requests at full length."""
    from transformers import AutoTokenizer

    from memshare.lab.bench.workloads import Source, build

    source = Source(AutoTokenizer.from_pretrained(model), requests, tokens, 20000, traces)
    tasks = build(texts, source)
    entries = TokenMap(BLOCK).entries
    blocks = int(sum(entries(task.need) for task in tasks) * fit / len(tasks))
    return ScheduleWorkload(
        f"{len(tasks)} x {texts} of up to {tokens} tokens, all at once",
        [ScheduledRequest(task.prompt, task.max_tokens, forced=task.forced) for task in tasks],
        blocks,
    )


def main() -> None:
    """Print one table a workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", choices=("solutions", "traces"), help="requests write these")
    parser.add_argument("--traces", type=Path, help="folder with JSON files, for traces")
    parser.add_argument("--requests", type=int, default=100, help="of --texts")
    parser.add_argument("--tokens", type=int, default=1100, help="of --texts, a request at most")
    parser.add_argument("--fit", type=int, default=8, help="requests for which there is memory")
    parser.add_argument("--budget", default="0.1,0.2,0.3,0.4", help="fractions, by ','")
    parser.add_argument("--limits", action="store_true", help="what compaction may drop")
    parser.add_argument("--lookahead", help="tokens that admission looks ahead, by ','")
    parser.add_argument("--kept", help="tokens that a request keeps, by ','")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        if options.limits:
            show_ratios(Path(folder), "dropped, thinning, recent", dict(_limits()))
        elif options.lookahead is not None:
            show_ratios(Path(folder), "lookahead", dict(_lookaheads(options.lookahead.split(","))))
        elif options.kept is not None:
            show_ratios(Path(folder), "tokens kept", dict(_kept(options.kept.split(","))))
        elif options.texts is not None:
            reasoner = reasoner_folder()
            work = of_texts(
                reasoner, options.texts, options.requests, options.tokens, options.fit,
                options.traces,
            )  # fmt: skip
            show(reasoner, work, dict(_budgets(options.budget.split(","))))
        else:
            model = tiny_folder(Path(folder))
            for work in of_lengths():
                show(model, work, ARMS)


def tiny_folder(folder: Path) -> Path:
    """Write a model's configuration there, for requests that write random tokens."""
    from tests.memshare.engine.harness import write_tiny_model

    return write_tiny_model(folder, max_position_embeddings=1 << 15)


def reasoner_folder() -> Path:
    """The small reasoner's folder, for requests that write its solutions."""
    from memshare.lab.bench.models import resolve
    from memshare.small_model.reasoner import NAME

    return Path(resolve(NAME))


def _budgets(fractions: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    names = ("max_shared_fraction", "max_dropped_fraction")
    for policy in ("twins", "oldest", "random", "compaction"):
        for fraction in fractions:
            budget = dict.fromkeys(names, float(fraction))
            yield f"`{policy}` {fraction}", POLICIES[policy] | {"budget": budget}


def show(model: Path, work: ScheduleWorkload, arms: dict[str, dict[str, Any]]) -> None:
    """Run dense, vLLM's own watermark and all arms, and print them."""
    print(f"\n{work.name}; {work.blocks} usable blocks:\n")
    print(table_head(HEADS))
    base = run(model, work, DENSE)
    print(row_of("dense", base, base))
    held = run(model, work, DENSE, WATERMARK)
    print(row_of(f"dense, `--watermark {WATERMARK}`", held, base), flush=True)
    for arm, options in arms.items():
        print(row_of(arm, run(model, work, options), base), flush=True)


def _limits() -> Iterator[tuple[str, dict[str, Any]]]:
    for dropped, thinning, recent in LIMITS:
        limits = {"max_dropped_fraction": dropped, "max_thinning": thinning}
        options = COMPACTION | {"budget": limits, "protect": {"recent_tokens": recent}}
        yield f"{dropped}, {thinning}, {recent}", options


def _lookaheads(tokens: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for ahead in tokens:
        yield ahead, COMPACTION | {"admission": {"lookahead_tokens": int(ahead)}}


def _kept(tokens: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "no budget", COMPACTION
    for most in tokens:
        yield most, COMPACTION | {"budget": {"max_kept_tokens": int(most)}}


def show_ratios(folder: Path, varied: str, arms: dict[str, dict[str, Any]]) -> None:
    """Print what arms gain, as multiples of dense's: tokens per step, preemptions (in brackets how
    many of how many came before any request had ended)."""
    tiny, reasoner = tiny_folder(folder), reasoner_folder()
    _, burst, mixed, _, long = of_lengths()
    works = [(tiny, burst), (tiny, mixed), (tiny, long)]
    works += [(reasoner, of_texts(reasoner, "solutions", n, 1100, 33)) for n in (100, 300)]
    bases = [run(model, work, DENSE) for model, work in works]
    print(table_head((varied, *(work.name for _, work in works))))
    for arm, options in arms.items():
        cells = [arm]
        for (model, work), base in zip(works, bases, strict=True):
            mine = run(model, work, options)
            steps, preempted = base.steps / mine.steps, mine.preemptions / max(1, base.preemptions)
            cells.append(f"{steps:.2f}x, {preempted:.2f}x ({mine.early} of {mine.preemptions})")
        print(table_row(cells), flush=True)


def run(
    model: Path, work: ScheduleWorkload, options: dict[str, Any], watermark: float = 0.0,
    **layers: int,
) -> ScheduleCounts:  # fmt: skip
    """Run a workload to its end; ``layers`` are ``block_size``, ``window`` and ``states`` of
    :class:`SchedulerHarness`."""
    from memshare.lab.simulate.costs import Recomputation
    from memshare.lab.simulate.harness import SchedulerHarness

    longest = max(len(job.prompt) + job.length for job in work.jobs) + 1
    rig = SchedulerHarness(
        model, options, work.blocks + 1, max_num_seqs=256, max_model_len=max(2048, longest),
        synchronous_search=True, watermark=watermark, **layers,
    )  # fmt: skip
    given_up: dict[str, float] = {}
    steps = preemptions = early = added = ended = 0
    again = Recomputation()
    while added < len(work.jobs) or rig.scheduler.requests:
        while added < len(work.jobs) and work.jobs[added].arrival <= steps:
            job = work.jobs[added]
            rig.add(f"r{added}", job.prompt, job.length, job.forced)
            added += 1
        output = rig.scheduler.schedule()
        again.add_step(rig.scheduler, output)
        preemptions += len(output.preempted_req_ids or ())
        if not ended:
            early = preemptions
        rig.finish_step(output)
        steps += 1
        ended = added - len(rig.scheduler.requests)
        if rig.side is not None:
            for state in rig.side.tracker:
                given_up[state.request_id] = state.lost / max(state.full, 1)
    totals = rig.side.recorder.counters.totals if rig.side is not None else Counter[str]()
    remaps = totals["applied"] + totals["compactions"]
    rig.close()
    tokens = sum(job.length for job in work.jobs)
    mean = sum(given_up.values()) / len(work.jobs)
    return ScheduleCounts(steps, tokens, preemptions, early, again.tokens, remaps, mean)


def row_of(arm: str, mine: ScheduleCounts, base: ScheduleCounts) -> str:
    """The row of an arm, beside dense's."""
    speed = mine.tokens / mine.steps
    return table_row(
        (
            arm,
            str(mine.steps),
            f"{speed:.1f} ({speed / (base.tokens / base.steps):.2f}x)",
            f"{mine.preemptions} ({mine.preemptions / max(1, base.preemptions):.2f}x)",
            f"{mine.recomputed} ({mine.recomputed / max(1, base.recomputed):.2f}x)",
            str(mine.remaps),
            f"{mine.given_up:.1%}",
        )
    )


if __name__ == "__main__":
    main()
