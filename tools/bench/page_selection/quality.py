"""Passkeys and divergence: the best pages, beside as many of the newest."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memshare.lab.markdown import table_head, table_row
from memshare.lab.replay.divergence import Divergence, measure
from memshare.lab.replay.traces import load_traces
from memshare.mechanisms.selection.budget import pages_read
from memshare.small_model.names import resolve_model, tokenizer_of
from tools.bench.page_selection.engine import PAGE, Arm, ForcingEngine, best, everything, newest

_FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_START = "There is important information hidden inside a lot of irrelevant text. Memorize it."
_QUESTION = " What is the pass key? The pass key is"


def measure_quality(
    model: str, dtype: str, traces: Path | None, texts: int, tokens: int, keys: int, context: int,
    budgets: list[float], exempt: int,
) -> None:  # fmt: skip
    """Print a table of all arms; see ``--help`` for what is measured."""
    folder = resolve_model(model)
    engine = ForcingEngine(
        folder, exempt, dtype=dtype, max_model_len=context + 256, max_num_seqs=1,
        max_num_batched_tokens=1024,
    )  # fmt: skip
    arms = list(_arms(budgets, context, exempt))
    found: dict[str, int] = dict.fromkeys((arm.name for arm in arms), 0)
    read: dict[str, float] = {}
    tokenizer: Any = tokenizer_of(folder)
    digits = 5
    for number in range(keys):
        key = str(random.Random(number).randrange(10**4, 10**5))
        text = _passkey(tokenizer, key, (number + 0.5) / keys, context)
        question = tokenizer.encode(_QUESTION)
        for arm in arms:
            engine.use(arm)
            # The question is forced, so that it is read by attention that selects.
            said, _ = engine.continue_with(text, question, digits + 2)
            found[arm.name] += key in tokenizer.decode(said)
            read[arm.name] = engine.read
        print(f"key {number}: {found}", flush=True)
    damage: dict[str, list[torch.Tensor]] = {arm.name: [] for arm in arms}
    if traces is not None:
        for ids in _texts(traces, tokenizer, texts, context + tokens):
            prompt, forced = ids[:context], ids[context:]
            exact = None
            for arm in arms:
                engine.use(arm)
                _, logs = engine.continue_with(prompt, forced, 1)
                exact = logs if exact is None else exact
                behind = torch.tensor(forced[1:])
                damage[arm.name].append(measure(exact, logs, behind))
                read[arm.name] = engine.read
            print(f"text: {[float(d[-1][:, 0].mean()) for d in damage.values()]}", flush=True)
    print(table_head(("pages", "read", "passkeys", "KL", "same top", "each text")))
    for arm in arms:
        row = [arm.name, f"{read[arm.name]:.1%}", f"{found[arm.name]} of {keys}"]
        if damage[arm.name]:
            total = Divergence.of([one.numpy() for one in damage[arm.name]])
            each = " ".join(f"{float(one[:, 0].mean()):.4f}" for one in damage[arm.name])
            row += [f"{total.kl[0]:.4f} ± {total.kl[1]:.4f}", f"{total.same_top[0]:.3f}", each]
        print(table_row(row))


def _arms(budgets: list[float], context: int, exempt: int) -> Iterator[Arm]:
    yield everything(exempt)
    for fraction in budgets:
        arm = best(fraction, exempt)
        yield arm
        pages = np.array([-(-context // PAGE)], np.int32)
        yield newest(int(pages_read(arm.config, pages)[0]), fraction, exempt)


def _passkey(tokenizer: Any, key: str, depth: float, context: int) -> list[int]:
    encode = tokenizer.encode
    needle = encode(f" The pass key is {key}. Remember it. {key} is the pass key.")
    start, filler = encode(_START), encode(_FILLER)
    room = context - len(start) - len(needle) - 20
    before = int(room * depth) // len(filler)
    after = room // len(filler) - before
    return [*start, *filler * before, *needle, *filler * after]


def _texts(folder: Path, tokenizer: Any, count: int, length: int) -> Iterator[list[int]]:
    for trace in load_traces(folder):
        ids = tokenizer.encode(trace.problem + "\n\n" + trace.reasoning)
        if len(ids) >= length and count:
            count -= 1
            yield ids[:length]
