"""The guard of one replica: has chosen answers scored, and decides when MemShare stops."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from cluster.guard.config import GuardConfig
from cluster.guard.evidence import Evidence, disagreement, interval
from cluster.guard.lot import Lot

logger = logging.getLogger(__name__)

_LOOK_S = 0.2  # between two looks for a quiet moment


class Scorable(Protocol):
    """What is scored: :class:`cluster.guard.answers.Answer`."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids."""

    @property
    def served(self) -> Sequence[float]:
        """Log-probabilities of the answer's tokens in the engine that wrote them."""


A = TypeVar("A", bound=Scorable)


class GuardMetrics(Protocol):
    """Where things are counted and shown: :class:`cluster.telemetry.metrics.ReplicaMetrics`."""

    def count(self, name: str, *values: str, by: int = 1) -> None:
        """Count ``by`` under a name and the values of its labels."""

    def show(self, name: str, *values: str, value: float) -> None:
        """Set a gauge."""


class GuardState(NamedTuple):
    """What the live page shows.

    Attributes:
        mean, low, high: of the disagreement of the last ``window`` shadows, with an interval of
            95 %; 0, 0 and 1 before the first.
        shadows: scored since the start.
        alarms: since the start.
        stopped: whether new requests run exact because of an alarm.
    """

    mean: float
    low: float
    high: float
    shadows: int
    alarms: int
    stopped: bool


class Guard(Generic[A]):
    """Everything runs on the replica's event loop, and is short but for the shadows."""

    def __init__(
        self,
        config: GuardConfig,
        score: Callable[[A], Awaitable[Sequence[float]]],
        is_quiet: Callable[[float], bool],
        metrics: GuardMetrics,
        chance: random.Random | None = None,
    ) -> None:
        """Begin with no evidence.

        Args:
            config: the guard's.
            score: log-probabilities of an answer's tokens by the exact model; the last may be
                missing.
            is_quiet: whether the engine has room, where at most this fraction of its cache is used.
            metrics: are told what happens.
            chance: the random numbers; by default such as nobody can foretell.
        """
        self._config = config
        self._score = score
        self._is_quiet = is_quiet
        self._metrics = metrics
        self._lot = Lot(config.share, chance or random.SystemRandom())
        self._waiting: deque[tuple[A, float]] = deque()
        self._arrived = asyncio.Event()
        self._shadows: list[asyncio.Task[None]] = []
        self._evidence = Evidence(config.bound, config.window)
        self._gathered = 0  # values of the present evidence
        self._values: deque[float] = deque(maxlen=config.window)
        self._found = interval(())
        self._scored = self._alarms = 0
        self._stopped = self._closed = False
        self._cooling: asyncio.TimerHandle | None = None

    @property
    def stopped(self) -> bool:
        """Whether new requests are to run exact."""
        return self._stopped

    def start(self) -> None:
        """Begin to score; to be called on the event loop."""
        self._metrics.show("guard_stopped", value=0.0)
        self._shadows = [
            asyncio.create_task(self._work()) for _ in range(self._config.concurrent)
        ]  # fmt: skip

    def close(self) -> None:
        """Drop what waits and abort what runs: shadows hold up no shutdown. Idempotent."""
        self._closed = True
        while self._waiting:
            self._drop()
        for task in self._shadows:
            task.cancel()
        if self._cooling is not None:
            self._cooling.cancel()

    def chooses(self) -> bool:
        """Whether the next request that could be scored is to be."""
        return not self._closed and self._lot.draw()

    def left_exact(self) -> None:
        """A request runs exact because MemShare has been stopped."""
        self._metrics.count("guard_exact_requests")

    def take(self, answer: A | Literal["untouched", "unscorable"]) -> None:
        """Take what a chosen request came to."""
        if answer == "untouched" or answer == "unscorable":
            self._metrics.count("guard_shadows", answer)
        elif self._closed or self._stopped:
            self._metrics.count("guard_shadows", "dropped")
        else:
            if len(self._waiting) >= self._config.waiting:
                self._drop()
            self._waiting.append((answer, time.monotonic() + self._config.patience_s))
            self._arrived.set()

    def let_go_on(self, who: Literal["operator", "cool_down"]) -> None:
        """End a stop. Nothing is known any more of what MemShare does now."""
        if not self._stopped:
            return
        self._stopped = False
        if self._cooling is not None:
            self._cooling.cancel()
        self._values.clear()
        self._renew()
        self._metrics.count("guard_resumes", who)
        self._show()
        logger.warning(
            "quality guard: MemShare goes on (%s)", who.replace("_", "-"),
            extra={"event": "guard_resumed", "by": who},
        )  # fmt: skip

    def state(self) -> GuardState:
        """For the live page."""
        found = self._found
        return GuardState(
            round(found.mean, 5), round(found.low, 5), round(found.high, 5),
            self._scored, self._alarms, self._stopped,
        )  # fmt: skip

    def judge(self, value: float) -> None:
        """Take the disagreement of one answer, 0..1."""
        if self._stopped:
            return  # an answer from before the stop, whose shadow ran beside the last one
        self._scored += 1
        self._values.append(value)
        if self._gathered == self._config.window:
            self._renew()
        self._gathered += 1
        self._evidence.add(value)
        self._show()
        if self._evidence.wealth >= 1.0 / self._config.false_alarm_rate:
            self._alarm()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if not self._waiting:
                self._arrived.clear()
                continue
            answer, until = self._waiting.popleft()
            try:
                await self._quiet(until)
                exact = await self._score(answer)
                self._metrics.count("guard_tokens", by=len(answer.prompt) + len(answer.served))
                # The last token has no place in a context that is full.
                self.judge(disagreement(answer.served[: len(exact)], exact))
                self._metrics.count("guard_shadows", "scored")
            except asyncio.CancelledError:
                self._metrics.count("guard_shadows", "dropped")
                raise
            except Exception:
                self._metrics.count("guard_shadows", "failed")
                logger.warning("quality guard: an answer could not be scored", exc_info=True)

    async def _quiet(self, until: float) -> None:
        while not self._is_quiet(self._config.max_usage) and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)

    def _alarm(self) -> None:
        self._alarms += 1
        found = self._found
        stops = self._config.on_alarm == "stop"
        self._metrics.count("guard_alarms")
        logger.error(
            "quality guard: of %d answers that MemShare approximated the exact model rejects %.3f "
            "of the tokens (95 %%: %.3f to %.3f), more than the bound of %g; %s",
            len(self._values), found.mean, found.low, found.high, self._config.bound,
            "new requests run exact" if stops else "MemShare goes on (on_alarm: report)",
            extra={"event": "guard_alarm", "stopped": stops, **found._asdict()},
        )  # fmt: skip
        self._renew()
        if not stops:
            return
        self._stopped = True
        while self._waiting:
            self._drop()
        if self._config.cool_down_s is not None:
            loop = asyncio.get_running_loop()
            self._cooling = loop.call_later(self._config.cool_down_s, self.let_go_on, "cool_down")
        self._show()

    def _renew(self) -> None:
        self._evidence = Evidence(self._config.bound, self._config.window)
        self._gathered = 0

    def _drop(self) -> None:
        self._waiting.popleft()
        self._metrics.count("guard_shadows", "dropped")

    def _show(self) -> None:
        self._found = interval(self._values)
        for name, value in self._found._asdict().items():
            self._metrics.show("guard_disagreement", name, value=value)
        self._metrics.show("guard_stopped", value=float(self._stopped))
