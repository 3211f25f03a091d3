"""``memshare plot``: pictures of what was measured, and of a text's own repetitions.

``arms``, ``usage``, ``waterfall`` and ``pareto`` draw records of ``memshare bench --json``;
``arms`` and ``pareto`` take several, of other arms with the same requests, as one. ``pareto`` also
draws tables of ``memshare replay --json``. ``steps`` and ``trace`` read a recorded text with a
model. The ending of ``--output`` decides the format: svg, png, pdf; html for ``trace``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.cli.options import count, fraction, new_file, whole
from memshare.errors import UserError

if TYPE_CHECKING:
    from memshare.lab.bench.records import ArmRun, BenchRecord
    from memshare.lab.plots.pareto import Point
    from memshare.lab.replay.prefilled import PrefilledTrace, Prefix, Reader
    from memshare.lab.replay.traces import RecordedText

_BLOCK = 32  # tokens
_WORK: dict[str, Callable[[ArmRun], float]] = {
    "second": lambda run: run.tokens_per_second,
    "step": lambda run: run.tokens_per_step,
    "cpu-second": lambda run: run.tokens / run.cpu_seconds,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    kinds = parser.add_subparsers(dest="kind", metavar="PICTURE", required=True)
    every = kinds.add_parser(
        "arms", help="correct answers, preemptions and tokens per step, by arm"
    )
    every.add_argument("records", type=Path, nargs="+", metavar="JSON")
    usage = kinds.add_parser("usage", help="KV memory over time, arm by arm")
    usage.add_argument("record", type=Path, metavar="JSON")
    usage.add_argument("--arms", help="separated by ',' (default: all)")
    waterfall = kinds.add_parser("waterfall", help="from all blocks to those given up")
    waterfall.add_argument("record", type=Path, metavar="JSON")
    waterfall.add_argument("--arm", default="twins")
    pareto = kinds.add_parser("pareto", help="accuracy against speed, or damage against memory")
    pareto.add_argument(
        "records", type=Path, nargs="+", metavar="JSON", help="of `bench`, or one of `replay`"
    )
    pareto.add_argument(
        "--work", choices=("second", "step", "cpu-second"), default="second",
        help="what tokens of a `bench` record are counted by: other load on the machine changes "
        "those of a second, never those of an engine step (default: second)",
    )  # fmt: skip
    steps = kinds.add_parser("steps", help="which reasoning steps are alike")
    trace = kinds.add_parser("trace", help="a text as a page, with what it writes more than once")
    for reads in (steps, trace):
        reads.add_argument("--traces", type=Path, required=True, metavar="DIR")
        reads.add_argument("--text", help="name of a file in it, without ending (default: first)")
        reads.add_argument("--model", default="smollm2-135m", help="name, folder or hub id")
        reads.add_argument("--tokens", type=count, default=1536, help="that are read")
        reads.add_argument("--freed", type=fraction, default=0.25, help="of the blocks")
        reads.add_argument("--recent", type=whole, default=128, help="protect.recent_tokens")
    for kind in kinds.choices.values():
        kind.add_argument("--output", type=new_file, required=True, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    """Draw one picture.

    Raises:
        UserError: a record, a text or an option cannot be used.
    """
    draw = {
        "arms": _arms, "usage": _usage, "waterfall": _waterfall, "pareto": _pareto,
        "steps": _steps, "trace": _trace,
    }  # fmt: skip
    draw[args.kind](args)
    print(args.output)
    return 0


def _arms(args: argparse.Namespace) -> None:
    from memshare.lab.plots.arms import plot_arms

    plot_arms(_together(args.records), args.output)


def _together(paths: list[Path]) -> BenchRecord:
    from memshare.lab.bench.records import BenchRecord

    return BenchRecord.together([BenchRecord.load(path) for path in paths])


def _usage(args: argparse.Namespace) -> None:
    from memshare.lab.bench.records import BenchRecord
    from memshare.lab.plots.usage import plot_usage

    record = BenchRecord.load(args.record)
    arms = args.arms.split(",") if args.arms else [run.arm for run in record.repeats[0]]
    for arm in arms:
        _run_of(record.repeats[0], arm, args.record)
    plot_usage(record, arms, args.output)


def _waterfall(args: argparse.Namespace) -> None:
    from memshare.lab.bench.records import BenchRecord
    from memshare.lab.plots.waterfall import plot_waterfall

    record = BenchRecord.load(args.record)
    run = _run_of(record.repeats[0], args.arm, args.record)
    if not run.block_outcomes:
        raise UserError(f"the arm {args.arm!r} is plain vLLM: it gives up nothing")
    plot_waterfall(run, args.output)


def _run_of(runs: list[ArmRun], arm: str, path: Path) -> ArmRun:
    for run in runs:
        if run.arm == arm:
            return run
    raise UserError(f"{path} has no arm {arm!r}; it has {', '.join(run.arm for run in runs)}")


def _pareto(args: argparse.Namespace) -> None:
    from memshare.lab.plots.pareto import accuracy_points, plot_pareto

    path, *others = args.records
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if isinstance(rows, list) and not others:
        if not rows:
            raise UserError(f"{path} is an empty table")
        panels, gain = {"KL, nats": _damage_points(rows, path)}, "blocks given up, %"
    else:
        if others and args.work != "step":
            raise UserError(
                "the load of the machine was another in each record; compare several by --work step"
            )
        record = _together(args.records)
        groups = accuracy_points(record, _WORK[args.work])
        if not groups:
            raise UserError(f"{path} has no graded answers; use the workload 'problems'")
        panels = {f"correct answers, {group} (%)": points for group, points in groups.items()}
        per = args.work.replace("-", " ").replace("cpu", "CPU")
        gain = f"tokens per {per}, {next(iter(record.arms))} = 1"
    plot_pareto(panels, gain, args.output)


def _damage_points(rows: list[dict[str, object]], path: Path) -> list[Point]:
    from memshare.cli.replay import ReplayRow
    from memshare.lab.plots.pareto import Point

    try:
        found = [ReplayRow(**row) for row in rows]  # type: ignore[arg-type]
        return [
            Point(row.arm, 100 * row.freed, kl, kl - error, kl + error)
            for row in found
            for kl, error in row.cells[:1]
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is no table of `memshare replay --json`: {error}") from None


def _steps(args: argparse.Namespace) -> None:
    from memshare.lab.plots.steps import kv, lexical, plot_steps, shared_steps
    from memshare.lab.plots.style import require_format

    require_format(args.output)
    reader, prefilled, trace = _read(args)
    bounds = reader.steps(prefilled)
    if len(bounds) < 3:
        raise UserError(f"{trace.name} has fewer than two steps in {args.tokens} tokens")
    after = _give_up(reader, prefilled, args.freed)
    panels = {
        "words (cosine)": lexical(prefilled.tokens.tolist(), bounds),
        "KV of the same tokens": kv(prefilled, bounds),
    }
    title = (
        f"{trace.name}, {args.tokens} tokens; outlined: {len(after.donor_of)} blocks of "
        f"{after.full} given up, from row to column"
    )
    plot_steps(panels, shared_steps(after.donor_of, _BLOCK, bounds), title, args.output)


def _trace(args: argparse.Namespace) -> None:
    from memshare.lab.plots.trace import marks, with_twin, write_trace
    from memshare.search.vocabulary import token_bytes

    if args.output.suffix != ".html":
        raise UserError(f"--output {args.output}: a trace is drawn as a page; end it in .html")
    reader, prefilled, trace = _read(args)
    before, after = _give_up(reader, prefilled, 0.0), _give_up(reader, prefilled, args.freed)
    vocabulary = token_bytes(reader.tokenizer)
    found = marks(prefilled, before, after, _BLOCK)
    later, earlier = with_twin(found)
    facts = {
        "model": args.model,
        "tokens": f"{prefilled.prefix}, {prefilled.prompt} of them prompt",
        "tokens with a twin": f"{later:.0%} that stands later, {earlier:.0%} that stands earlier",
        "blocks given up": f"{len(after.donor_of)} of {after.full}, by the policy twins",
    }
    tokens = [vocabulary[token] for token in prefilled.tokens[: prefilled.prefix].tolist()]
    write_trace(tokens, found, f"{trace.name}: what it writes more than once", facts, args.output)


def _read(args: argparse.Namespace) -> tuple[Reader, PrefilledTrace, RecordedText]:
    from memshare.lab.bench.models import resolve
    from memshare.lab.bench.workloads import Source
    from memshare.lab.replay.prefilled import Reader
    from memshare.lab.replay.traces import load_traces

    texts = list(load_traces(args.traces))
    trace = next((text for text in texts if args.text in (None, text.name)), None)
    if trace is None:
        names = ", ".join(text.name for text in texts)
        raise UserError(f"--text {args.text}: {args.traces} has no such text; it has {names}")
    reader = Reader(resolve(args.model), _BLOCK, args.recent)
    source = Source(reader.tokenizer, 1, args.tokens)
    prompt = source.chat(trace.problem)
    text = source.ids(trace.reasoning)[: max(0, args.tokens - len(prompt))]
    if len(prompt) + len(text) < args.tokens:
        raise UserError(
            f"{trace.name} has {len(prompt) + len(text)} tokens with its prompt; lower --tokens"
        )
    return reader, reader.read(prompt, text, args.tokens), trace


def _give_up(reader: Reader, prefilled: PrefilledTrace, fraction: float) -> Prefix:
    from memshare.mechanisms.twins.params import TwinsParams

    return reader.give_up(prefilled, TwinsParams(name="twins"), fraction)
