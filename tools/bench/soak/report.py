"""What a soak run has seen, what that is held against, and the report."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from memshare.lab.bench.report import wilson
from memshare.lab.markdown import table
from memshare.lab.problems import generate, read_answer
from tools.bench.load import StreamOutcome, summarize

# What a client may see for so long after service is whole: it was sent into the fault.
AFTERMATH_S = 5.0
SMALL_MIB = 20  # what a process must have to be listed
GROWTH_LIMIT = 0.05  # of memory, from the second quarter of a run to the last
COUNTED = (
    "vllm:num_preemptions_total", "vllm:memshare_blocks_reclaimed_total",
    "vllm:memshare_integrity_checks_total", "vllm:memshare_sharing_stopped",
    "vllm:memshare_remap_misses_total",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A part that was killed, times in seconds since the start.

    Attributes:
        role: of the process.
        at: when.
        whole_at: when everything was back.
    """

    role: str
    at: float
    whole_at: float


@dataclass(frozen=True)
class ClusterSample:
    """What the cluster holds at one moment.

    Attributes:
        at: seconds since the start.
        quiet: whether nothing was running.
        memory: proportional set size of every process, bytes, by what it is and its id.
        total: of all processes, bytes.
        processes: how many there are.
        segments: in shared memory, of those that one of our processes has ever used.
        ports: that somebody of ours listens on.
        kv_usage: fraction of a replica's KV blocks that requests hold, the greatest of all; nan
            while nobody answers.
    """

    at: float
    quiet: bool
    memory: dict[str, int]
    total: int
    processes: int
    segments: int
    ports: int
    kv_usage: float


@dataclass(frozen=True)
class Check:
    """One question that the run answers."""

    name: str
    passed: bool
    found: str


@dataclass
class SoakRecord:
    """Everything that was seen; ``cut_short`` says what ended the run before its time."""

    command: str
    machine: str
    seconds: float = 0.0
    cut_short: str = ""
    faults: list[Fault] = field(default_factory=list)
    outcomes: list[StreamOutcome] = field(default_factory=list)
    samples: list[ClusterSample] = field(default_factory=list)
    probes: list[tuple[float, list[str]]] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))


def _is_right(outcome: StreamOutcome) -> bool:
    problem = generate("chain" if outcome.index % 2 else "recall", 10_000 + outcome.index)
    return read_answer(outcome.text) == problem.answer


def judge(record: SoakRecord, graded: bool) -> Iterator[Check]:
    """The checks of a run."""
    yield Check("the run went to its end", not record.cut_short, record.cut_short or "yes")
    bad = [o for o in record.outcomes if o.ending == "failed" and not excused(o, record.faults)]
    details = Counter(outcome.detail for outcome in bad).most_common(3)
    yield Check("no request fails outside a fault", not bad, f"{len(bad)} failed {details or ''}")
    slow = [f for f in record.faults if f.whole_at - f.at > 60]
    yield Check(
        "service is whole within 60 s", not slow, f"{len(slow)} of {len(record.faults)} took longer"
    )
    if not record.probes:
        return
    first, *later = [answers for _, answers in record.probes]
    changed = sum(answers != first for answers in later)
    yield Check(
        "fixed questions are answered as at the start",
        not changed,
        f"{changed} of {len(later)} rounds differ",
    )
    failures = sum(record.counters[name] for name in COUNTED[2:])
    yield Check(
        "bookkeeping is sound",
        not failures,
        f"{record.counters[COUNTED[2]]} failed integrity checks, "
        f"{record.counters[COUNTED[4]]} remap misses",
    )
    quiet = [sample for sample in record.samples if sample.quiet]
    leaked = [sample for sample in quiet if sample.kv_usage > 0]
    yield Check(
        "every KV block is free when nothing runs",
        not leaked,
        f"{len(leaked)} of {len(quiet)} times not",
    )
    for name in ("processes", "segments", "ports"):
        before, after = getattr(quiet[0], name), getattr(quiet[-1], name)
        yield Check(f"no {name} are left over", after <= before, f"{before} before, {after} after")
    grown = growth([sample.total for sample in record.samples])
    yield Check("memory is flat after warm-up", grown <= GROWTH_LIMIT, f"{grown:+.1%}")
    if graded:
        yield _accuracy(record)


def _accuracy(record: SoakRecord) -> Check:
    whole = [o for o in record.outcomes if o.ending == "whole"]
    halves = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    right = [sum(map(_is_right, half)) for half in halves]
    bounds = [
        wilson(r / len(half), len(half)) if half else (0.0, 1.0)
        for r, half in zip(right, halves, strict=True)
    ]
    shown = ", then ".join(f"{r} of {len(half)}" for r, half in zip(right, halves, strict=True))
    return Check("accuracy does not drift", bounds[1][1] >= bounds[0][0], f"{shown} right")


def excused(outcome: StreamOutcome, faults: Sequence[Fault]) -> bool:
    """Whether a request was under way while something was broken."""
    return any(
        outcome.sent <= fault.whole_at + AFTERMATH_S and outcome.ended >= fault.at
        for fault in faults
    )


def growth(values: Sequence[float]) -> float:
    """From the median of the second quarter to that of the last, as a fraction; 0 of too few."""
    quarter = len(values) // 4
    if quarter < 2:
        return 0.0
    before, after = (
        statistics.median(values[quarter : 2 * quarter]),
        statistics.median(values[-quarter:]),
    )
    return after / before - 1 if before else 0.0


def render(record: SoakRecord, checks: Sequence[Check]) -> str:
    """The report, in Markdown."""
    summary = summarize(record.outcomes)
    lines = [
        f"`python -m tools.bench.soak {record.command}`, {record.seconds / 60:.1f} minutes, "
        f"{record.machine}.",
        "",
        table(
            ["check", "", "found"],
            [[c.name, "ok" if c.passed else "**no**", c.found] for c in checks],
        ),
        "",
        f"Requests: {summary.endings}; {summary.requests_per_s:.2f} whole a second; first token "
        f"p50 {summary.first_token_p50:.2f} s, p99 {summary.first_token_p99:.2f} s. Preemptions "
        f"and blocks reclaimed, most of one engine's life: {record.counters[COUNTED[0]]}, "
        f"{record.counters[COUNTED[1]]}.",
    ]
    if record.faults:
        lines += [
            "",
            table(
                [
                    "killed",
                    "times",
                    "whole again, s: median (most)",
                    "requests failed",
                    "answered meanwhile",
                ],
                [_fault_row(role, record) for role in sorted({f.role for f in record.faults})],
            ),
        ]
    lines += [
        "",
        table(
            ["process", "memory after warm-up, MiB", "at the end", "growth", "slope, MiB/min"],
            list(_memory_rows(record.samples)),
        ),
        "",
        "Memory is the proportional set size: medians of the first and last third after warm-up, a "
        f"quarter of the run. Listed are those who lived from then on and have {SMALL_MIB} MiB.",
    ]
    return "\n".join(lines)


def _fault_row(role: str, record: SoakRecord) -> list[str]:
    mine = [fault for fault in record.faults if fault.role == role]
    taken = [fault.whole_at - fault.at for fault in mine]
    failed = sum(o.ending == "failed" and excused(o, mine) for o in record.outcomes)
    answered = sum(
        o.ending == "whole" and any(f.at < o.ended < f.whole_at for f in mine)
        for o in record.outcomes
    )
    times = f"{statistics.median(taken):.1f} ({max(taken):.1f})"
    return [role, str(len(mine)), times, str(failed), str(answered)]


def _memory_rows(samples: Sequence[ClusterSample]) -> Iterator[list[str]]:
    """A row for each process that was there all the time after warm-up, and one for all."""
    warm = samples[len(samples) // 4 :]
    if len(warm) < 4:
        return
    minutes = [sample.at / 60 for sample in warm]
    steady = set.intersection(*(set(sample.memory) for sample in warm))
    of_each = {name: [sample.memory[name] for sample in warm] for name in sorted(steady)}
    third = len(warm) // 3
    for name, sizes in (of_each | {"all processes": [sample.total for sample in warm]}).items():
        mib = [size / (1 << 20) for size in sizes]
        if max(mib) < SMALL_MIB:
            continue
        before, after = statistics.median(mib[:third]), statistics.median(mib[-third:])
        slope = statistics.linear_regression(minutes, mib).slope
        grown = f"{after / before - 1:+.1%}"
        yield [name, f"{before:.0f}", f"{after:.0f}", grown, f"{slope:+.2f}"]


def write(folder: Path, record: SoakRecord, checks: Sequence[Check]) -> None:
    """Print the report, and leave it in ``folder`` with everything that was seen."""
    report = render(record, checks)
    (folder / "report.md").write_text(report + "\n")
    (folder / "report.json").write_text(
        json.dumps({"checks": [asdict(c) for c in checks], **asdict(record)}, indent=1)
    )
    print(report, flush=True)
