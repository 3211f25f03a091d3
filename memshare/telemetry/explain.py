"""Log lines that explain reclaims and preemptions: which requests, why; at a bounded rate."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

from memshare.config import LogConfig

logger = logging.getLogger(__name__)

# Why blocks are reclaimed, and the same in words.
Cause = Literal["allocation", "demand", "admission", "watermark", "eager", "budget"]
_CAUSES: dict[Cause, str] = {
    "allocation": "vLLM found no free block for a running request",
    "demand": "the next steps need more blocks than are free",
    "admission": "a waiting request fits once running ones are smaller",
    "watermark": "fewer blocks are free than the low watermark",
    "eager": "the trigger is eager",
    "budget": "a request holds more than budget.max_kept_tokens",
}
_NAMED = 5  # requests, those with most blocks; the others are counted


class Explainer:
    """Sums up what happens and tells it in one line every ``logs.explain_every_s`` seconds."""

    def __init__(self, config: LogConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = config.explain_every_s
        self._clock = clock
        self._reclaims = _Sum(clock())
        self._preemptions = _Sum(clock())
        self._obstacle = ""

    def reclaimed(self, request: str, blocks: int, cause: Cause) -> None:
        """A remap of ``request`` has freed this many blocks."""
        if self._every:
            self._reclaims.add_blocks(request, blocks, _CAUSES[cause])

    def preempted(self, request: str, blocks: int) -> None:
        """vLLM has taken this many full blocks from ``request``."""
        if self._every:
            obstacle = self._obstacle or "it was not asked"
            self._preemptions.add_blocks(request, blocks, f"reclaiming freed nothing: {obstacle}")

    def in_vain(self, obstacle: str) -> None:
        """Reclaiming was asked, in this step, and freed nothing; a phrase says what stood in its
        way."""
        self._obstacle = obstacle

    def tell(self, free: int, total: int) -> None:
        """Write the lines that are due.

        Args:
            free: KV blocks now.
            total: KV blocks.
        """
        self._obstacle = ""
        if not (self._reclaims or self._preemptions):
            return
        now = self._clock()
        if self._preemptions.is_due(now, self._every):
            self._write("preempted", self._preemptions, free, total)
            self._preemptions = _Sum(now)
        if self._reclaims.is_due(now, self._every):
            self._write("reclaimed", self._reclaims, free, total)
            self._reclaims = _Sum(now)

    def _write(
        self, what: Literal["preempted", "reclaimed"], summed: _Sum, free: int, total: int
    ) -> None:
        blocks = summed.blocks.total()
        logger.log(
            logging.WARNING if what == "preempted" else logging.INFO,
            "%s: %d blocks; requests: %d (%s); why: %s; free now: %d of %d blocks",
            what, blocks, len(summed.blocks), _listed(summed.blocks),
            ", ".join(f"{cause} ({times}x)" for cause, times in summed.causes.most_common()),
            free, total,
            extra={
                "event": what, "blocks": blocks, "requests": dict(summed.blocks.most_common(64)),
                "causes": dict(summed.causes), "free_blocks": free, "total_blocks": total,
            },
        )  # fmt: skip


class _Sum:
    """What has happened since the last line. False if nothing has."""

    def __init__(self, last_line: float) -> None:
        self._last_line = last_line
        self.blocks: Counter[str] = Counter()  # by request
        self.causes: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self.causes)

    def is_due(self, now: float, every: float) -> bool:
        return bool(self) and now - self._last_line >= every

    def add_blocks(self, request: str, blocks: int, cause: str) -> None:
        self.blocks[request] += blocks
        self.causes[cause] += 1


def _listed(blocks: Counter[str]) -> str:
    named = [f"{request}: {count}" for request, count in blocks.most_common(_NAMED)]
    more = len(blocks) - len(named)
    return ", ".join([*named, *([f"{more} more"] if more else [])])
