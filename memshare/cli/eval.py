"""``memshare eval``: accuracy of a model with and without sharing, question by question.

The model is an engine of our own (``--model``), one for each arm, or one that is served
(``--url``): then the arms are its requests with MemShare and with ``memshare: off``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memshare.cli.options import add_sharing, budgets, count, new_file, sharing
from memshare.errors import UserError
from memshare.lab.bench.arms import CHOICES, Arm, expand, require_kv_types, wider
from memshare.lab.bench.estimate import Work, estimate, in_words
from memshare.lab.bench.progress import ProgressBars
from memshare.lab.bench.report import accuracy_cells
from memshare.lab.evals.answers import (
    EngineSettings,
    ModelAnswer,
    Sampling,
    from_engine,
    from_server,
)
from memshare.lab.evals.grading import is_right
from memshare.lab.evals.questions import NAMES, Question, load
from memshare.lab.markdown import table

logger = logging.getLogger(__name__)

SERVED_ARMS = ("exact", "shared")
_MAX_SEQS = 256  # vLLM's own default for an engine in this process


@dataclass(frozen=True, slots=True)
class Graded:
    """What one arm has answered: ``[questions][samples]``."""

    arm: str
    shares: bool
    """Whether its requests may give up blocks."""
    answers: list[list[ModelAnswer]]
    right: list[list[bool]]

    @property
    def every(self) -> list[tuple[ModelAnswer, bool]]:
        """Answers, and whether they are right, a sample after the other."""
        return list(zip(itertools.chain(*self.answers), itertools.chain(*self.right), strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = __doc__
    parser.add_argument("--suite", default="recall", choices=NAMES, help="what is asked")
    parser.add_argument("--data", type=Path, metavar="FILE", help="JSONL in the suite's format")
    parser.add_argument("--limit", type=count, help="questions (default: all; 200 if generated)")
    parser.add_argument("--seed", type=int, default=0, help="of generated questions, and sampling")
    parser.add_argument("--samples", type=count, default=1, help="answers to each question")
    parser.add_argument("--max-tokens", type=count, default=1536, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="of nucleus sampling")
    served = parser.add_argument_group("a served model (--url)")
    served.add_argument("--url", help="OpenAI API, as http://127.0.0.1:8000/v1")
    served.add_argument("--key", default="none", help="API key")
    served.add_argument("--at-once", type=count, default=32, help="requests under way")
    engine = parser.add_argument_group("an engine of our own (without --url)")
    parser.add_argument("--model", default="smollm2-135m-reasoner", help="name, folder or hub id")
    engine.add_argument("--arms", default="dense,twins", help=f"of {CHOICES}")
    add_sharing(engine)
    engine.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    engine.add_argument(
        "--max-model-len",
        type=count,
        help="tokens (default: the longest question and --max-tokens)",
    )
    engine.add_argument("--block-size", type=count, default=32, help="tokens")
    engine.add_argument("--blocks", type=count, help="KV blocks (default: what the machine has)")
    engine.add_argument("--tensor-parallel-size", type=count, default=1, help="ranks")
    engine.add_argument("--eager", action="store_true", help="compile nothing: starts at once")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write every answer there")


def run(args: argparse.Namespace) -> int:
    """Ask, grade, and print a table.

    Raises:
        UserError: an option cannot be used, or the model cannot be asked.
    """
    sampling = Sampling(args.samples, args.max_tokens, args.temperature, args.top_p, args.seed)
    if sampling.samples > 1 and sampling.temperature == 0:
        raise UserError("--samples above 1 wants a --temperature above 0: all would be the same")
    questions = load(args.suite, args.limit, args.data, args.seed)
    arms = (_ask_server if args.url else _ask_engines)(args, questions, sampling)
    found: list[Graded] = []
    for graded in arms:
        found.append(graded)
        if args.json is not None:  # after every arm: a later one may fail
            args.json.write_text(json.dumps(_record(questions, sampling, found)))
    print(_table(args.suite, found))
    sharing_arms = [graded for graded in found if graded.shares]
    if sharing_arms and not any(a.given_up for graded in sharing_arms for a, _ in graded.every):
        print(
            "\nNo request gave up a block, so sharing was not compared: memory was enough. "
            + ("Ask more at once (--at-once)." if args.url else "Give less of it (--blocks).")
        )
    return 0


def _table(suite: str, found: list[Graded]) -> str:
    heads = (
        "arm", suite, "correct", "95 %", "change", "tokens per answer", "cut off", "gave up blocks",
    )  # fmt: skip
    rows = []
    for graded in found:
        answers = [answer for answer, _ in graded.every]
        row = [
            graded.arm,
            *accuracy_cells(graded.right, found[0].right),
            f"{statistics.fmean(answer.tokens for answer in answers):.0f}",
            str(sum(answer.cut for answer in answers)),
            str(sum(answer.given_up > 0 for answer in answers)),
        ]
        rows.append(row)
    return table(heads, rows)


def _ask_engines(
    args: argparse.Namespace, questions: list[Question], sampling: Sampling
) -> Iterator[Graded]:
    from memshare.lab.bench.models import resolve

    arms = list(expand(args.arms, budgets(args), sharing(args)))
    require_kv_types(arms)
    prompts = [question.prompt for question in questions]
    model = resolve(args.model)
    length = longest(model, prompts) + sampling.max_tokens
    if args.max_model_len is not None and args.max_model_len < length:
        raise UserError(
            f"--max-model-len {args.max_model_len} would cut answers off: the longest question and "
            f"--max-tokens {sampling.max_tokens} are {length} tokens; raise it, or leave it out"
        )
    engine = EngineSettings(
        model, args.dtype, args.max_model_len or length, args.block_size, args.blocks,
        args.tensor_parallel_size, args.eager,
    )  # fmt: skip
    count = len(questions) * sampling.samples
    how_long = _how_long(args, engine, count, length, len(arms))
    print(
        f"{count} answers of {sampling.max_tokens} tokens at most to {len(questions)} questions "
        f"({args.suite}), for each of {len(arms)} arms ({args.arms}); {args.model} "
        f"({args.dtype}).{_memory(args, arms)} {how_long}\n",
        flush=True,
    )
    progress = ProgressBars(len(arms))
    with tempfile.TemporaryDirectory(prefix="memshare-eval-") as folder:
        for arm in arms:
            with progress.run(arm.name) as told:
                answers = from_engine(prompts, sampling, engine, arm, Path(folder), told)
            yield _grade(arm.name, arm.shares, questions, answers)


def _memory(args: argparse.Namespace, arms: list[Arm]) -> str:
    if args.blocks is None:
        return ""
    return f" {args.blocks - 1} usable KV blocks.{wider(arms, args.blocks, args.dtype)}"


def _how_long(
    args: argparse.Namespace, engine: EngineSettings, count: int, length: int, arms: int
) -> str:
    """Answers may end at any length: what is told is how long the longest take."""
    batch: float = min(count, _MAX_SEQS)
    if engine.blocks is not None:
        batch = max(1, min(batch, (engine.blocks - 1) * engine.block_size / length))
    work = Work(
        engine.model, engine.dtype, arms, steps=count * args.max_tokens / batch, batch=batch,
        context=length / 2,
    )  # fmt: skip
    shorter = "a smaller --limit or --max-tokens makes it shorter"
    return f"If all are that long: {in_words(estimate(work), shorter)}"


def longest(model: str, prompts: list[str]) -> int:
    """Tokens of the longest prompt, as a chat."""
    from memshare.lab.bench.workloads import Source
    from memshare.small_model.names import tokenizer_of

    source = Source(tokenizer_of(model), len(prompts), 0)
    return max(len(source.chat(prompt)) for prompt in prompts)


def _ask_server(
    args: argparse.Namespace, questions: list[Question], sampling: Sampling
) -> Iterator[Graded]:
    prompts = [question.prompt for question in questions]
    count = len(questions) * sampling.samples
    print(
        f"{count} answers of {sampling.max_tokens} tokens at most to {len(questions)} questions "
        f"({args.suite}), {args.at_once} at once, once with sharing and once without; "
        f"{args.model} at {args.url}. The bar tells how long that takes.\n",
        flush=True,
    )
    progress = ProgressBars(len(SERVED_ARMS), "waiting for answers")
    for arm in SERVED_ARMS:
        with progress.run(arm) as told:
            answers = from_server(
                prompts, sampling, args.url, args.model, args.key, args.at_once, arm == "shared",
                told,
            )  # fmt: skip
        yield _grade(arm, arm == "shared", questions, answers)


def _grade(
    arm: str, shares: bool, questions: list[Question], answers: list[list[ModelAnswer]]
) -> Graded:
    right = [
        [is_right(question, answer.text) for answer in samples]
        for question, samples in zip(questions, answers, strict=True)
    ]
    graded = Graded(arm, shares, answers, right)
    every = [right for _, right in graded.every]
    logger.info("%s: %d of %d right", arm, sum(every), len(every))
    return graded


def _record(
    questions: list[Question], sampling: Sampling, found: list[Graded]
) -> list[dict[str, object]]:
    return [
        {
            "arm": graded.arm,
            "question": questions[i // sampling.samples].name,
            "right": right,
            "tokens": answer.tokens,
            "cut_off": answer.cut,
            "blocks_given_up": answer.given_up,
            "text": answer.text,
        }
        for graded in found
        for i, (answer, right) in enumerate(graded.every)
    ]
