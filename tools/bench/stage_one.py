"""Stage one on one core: how many tokens a second, and what it remembers of a long request.

    python -m tools.bench.stage_one
    python -m tools.bench.stage_one --traces FOLDER --rounds 5

The texts are worked solutions of the test reasoner's problems, or recorded ones (see `memshare
replay`). Every round reads all texts with each part in turn, in an order of its own: finding the
steps (the segmenter, on the engine's thread), comparing them (``paper``) and aligning tokens
(``twins``), both on an evaluator. Seconds are of this thread's CPU time.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.config import MemShareConfig, load_config
from memshare.lab.bench.report import machine, spread
from memshare.lab.bench.workloads import Source, build
from memshare.lab.markdown import table
from memshare.lab.replay.traces import load_traces
from memshare.search.evaluate import NewSteps, StageOne, open_stage_one
from memshare.search.steps import StepSegmenter, compile_delimiters
from memshare.search.vocabulary import token_bytes
from memshare.small_model.names import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG = 32_768  # tokens of the request whose memory is told


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, metavar="DIR", help="recorded texts")
    parser.add_argument("--texts", type=int, default=200, help="generated ones, if not recorded")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
    texts = list(_texts(args, tokenizer))
    total = sum(map(len, texts))
    configs = {n: load_config({"policy": {"name": n}}, {}) for n in ("paper", "twins")}
    automaton = compile_delimiters(configs["paper"].steps.delimiters, token_bytes(tokenizer))
    steps = configs["paper"].steps

    def segment() -> list[list[int]]:
        """Bounds of the steps of each text."""
        return [_bounds(StepSegmenter(automaton, steps.min_tokens, steps.max_tokens), text)
                for text in texts]  # fmt: skip

    bounds = segment()
    count = sum(len(those) - 1 for those in bounds)
    print(f"{len(texts)} texts, {total} tokens, {count} steps; {machine()}\n")
    parts: dict[str, Callable[[], object]] = {
        "finding steps": segment,
        **{name: _reader(config, texts, bounds) for name, config in configs.items()},
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    order = list(parts)
    for number in range(args.rounds):
        random.Random(number).shuffle(order)
        for name in order:
            began = time.thread_time()
            parts[name]()
            taken[name].append(total / (time.thread_time() - began))
    rows = [[name, spread([each / 1000 for each in speeds], 0)] for name, speeds in taken.items()]
    print(table(("part", "thousand tokens a second of one core"), rows))
    long = list(islice((token for text in _again(texts) for token in text), LONG))
    limits = _bounds(StepSegmenter(automaton, steps.min_tokens, steps.max_tokens), long)
    rows = [[name, f"{_memory(config, long, limits):.1f}"] for name, config in configs.items()]
    print(f"\n{table(('evaluator', f'MB for a request of {LONG} tokens'), rows)}")


def _texts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    source = Source(tokenizer, args.texts, sys.maxsize)
    if args.traces is not None:
        yield from (source.ids(trace.reasoning) for trace in load_traces(args.traces))
    else:
        yield from (task.forced or [] for task in build("solutions", source))


def _again(texts: list[list[int]]) -> Iterator[list[int]]:
    while True:
        yield from texts


def _bounds(segmenter: StepSegmenter, text: list[int]) -> list[int]:
    """Where steps end in a text that comes token by token; the unfinished last one is left out."""
    bounds = [0]
    for token in text:
        _, (_, *ends) = segmenter.feed((token,))
        bounds += [bounds[-1] + end for end in ends]
    return bounds


def _reader(
    config: MemShareConfig, texts: list[list[int]], bounds: list[list[int]]
) -> Callable[[], None]:
    def read() -> None:
        evaluator = open_stage_one(config)
        for number, (text, limits) in enumerate(zip(texts, bounds, strict=True)):
            _read(evaluator, config, str(number), text, limits)
            evaluator.forget_histories([str(number)], [str(number)])

    return read


def _read(
    evaluator: StageOne, config: MemShareConfig, name: str, text: list[int], bounds: list[int]
) -> None:
    """One request, step by step as an engine hands them over."""
    threshold = config.steps.similarity_threshold
    for first, last in pairwise(bounds):
        step = text[first:last]
        evaluator.evaluate([NewSteps(name, 0, name, first, step, (0, len(step)), threshold, 0.0)])


def _memory(config: MemShareConfig, text: list[int], bounds: list[int]) -> float:
    evaluator = open_stage_one(config)
    tracemalloc.start()
    _read(evaluator, config, "long", text, bounds)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / 1e6


if __name__ == "__main__":
    main()
