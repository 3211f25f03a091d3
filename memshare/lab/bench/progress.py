"""Progress of a comparison and its remaining time: reported by its engines, shown to the user."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from memshare.lab.bench.engine_process import OnProgress, ProgressTeller

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.request import Request

_LOG_EVERY = 30.0  # seconds between lines where there is no terminal to draw on
_TICK = 1.0  # seconds between two drawings of the bars
# As tqdm fills them in.
_ALL = "{desc} {percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left"
_START = "{desc}, {elapsed} passed"
_RUN = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} tokens, {elapsed} passed, "
    "{remaining} left{postfix}"
)

logger = logging.getLogger(__name__)


def follow(engine: Any, likely: int | None = None) -> None:
    """From now on tell, after an engine step, how many tokens are written of how many.

    Args:
        engine: vLLM's engine, with its scheduler in this process.
        likely: tokens that a request is likely to write which may end before its limit; None: as
            many as those that have ended, and its limit as long as there are none.
    """
    llm_engine: LLMEngine = engine
    core: Any = llm_engine.engine_core
    count = _Count(core.engine_core.scheduler.requests, likely)
    teller = ProgressTeller()
    step = llm_engine.step

    def told() -> Any:
        outputs = step()
        count.look()
        teller.tell(**count.told())
        return outputs

    llm_engine.step = told  # type: ignore[method-assign]


class _Count:
    """Tokens that requests have written.

    Args:
        requests: those that the scheduler has, by name; what has ended leaves it.
        likely: see :func:`follow`.
    """

    def __init__(self, requests: dict[str, Request], likely: int | None) -> None:
        self._requests = requests
        self._likely = likely
        self._written: dict[str, int] = {}

    def look(self) -> None:
        """See what every request has written."""
        self._written |= {name: r.num_output_tokens for name, r in self._requests.items()}

    def told(self) -> dict[str, int]:
        """``written`` of ``total`` tokens; ``ended`` of ``requests`` requests."""
        ended = [n for name, n in self._written.items() if name not in self._requests]
        usual = sum(ended) // len(ended) if ended else self._likely
        total = sum(ended) + sum(self._expected(r, usual) for r in self._requests.values())
        written = sum(self._written.values())
        return {
            "written": written, "total": total, "ended": len(ended), "requests": len(self._written)
        }  # fmt: skip

    @staticmethod
    def _expected(request: Request, usual: int | None) -> int:
        if usual is None or request.sampling_params is None or request.sampling_params.ignore_eos:
            return request.max_tokens
        return max(request.num_output_tokens, min(usual, request.max_tokens))


class ProgressBars:
    """Two bars: over all runs of a comparison, and over the tokens of the one that runs.

    Where standard error is no terminal, the log has a line every half minute instead.
    """

    def __init__(self, runs: int, first: str = "starting the engine") -> None:
        """Nothing has run yet, of ``runs`` runs; ``first`` is what each does before any token."""
        self._runs = runs
        self._first = first
        self._done = 0.0
        self._began = time.monotonic()
        self._draws = sys.stderr.isatty()

    @contextmanager
    def run(self, name: str) -> Iterator[OnProgress]:
        """Show the next run while it lasts; yields what it tells its progress to."""
        number = int(self._done) + 1
        title = f"{name} ({number} of {self._runs})"
        began = last = 0.0  # of its first tokens, and of the last line
        with (
            self._bar("all runs", 0, self._runs, _ALL) as whole,
            self._bar(f"{title}: {self._first}", 1, None, _START) as bar,
        ):
            if self._draws:  # its clock runs since the first run, and the bar is drawn anew
                whole.start_t -= time.monotonic() - self._began
            whole.n = self._done

            def told(counts: dict[str, int]) -> None:
                nonlocal began, last
                now = time.monotonic()
                if not began:
                    began = last = now
                    bar.bar_format = _RUN
                    bar.set_description_str(title, refresh=False)
                    bar.reset(counts["total"])
                bar.total = counts["total"]
                bar.set_postfix_str(f"{counts['ended']} of {counts['requests']} texts", False)
                bar.update(counts["written"] - bar.n)
                self._done = number - 1 + counts["written"] / max(counts["total"], 1)
                whole.update(self._done - whole.n)
                if not self._draws and now >= last + _LOG_EVERY:
                    last = now
                    self._log(title, counts, now - began)

            with _ticking(whole, bar):
                yield told
        self._done = number

    def _bar(self, title: str, position: int, total: int | None, layout: str) -> Any:
        return tqdm(
            desc=title, total=total, bar_format=layout, position=position, leave=False,
            disable=not self._draws, smoothing=0.0 if position == 0 else 0.1, dynamic_ncols=True,
        )  # fmt: skip

    def _log(self, title: str, counts: dict[str, int], seconds: float) -> None:
        """One line that stands for both bars."""
        written, total = counts["written"], counts["total"]
        logger.info(
            "%s: %d of %d tokens, %d of %d texts, %s left; all runs: %s left",
            title, written, total, counts["ended"], counts["requests"],
            _left(written / max(total, 1), seconds),
            _left(self._done / self._runs, time.monotonic() - self._began),
        )  # fmt: skip


@contextmanager
def _ticking(*bars: Any) -> Iterator[None]:
    """Draw bars every second, also while nothing is told: an engine starts in silence."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(_TICK):
            for bar in bars:
                bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _left(done: float, seconds: float) -> str:
    """How long the rest takes if the part ``done``, a fraction, took so long."""
    if done <= 0:
        return "?"
    interval: str = tqdm.format_interval(seconds * (1 - done) / done)
    return interval
