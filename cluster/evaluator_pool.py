"""Stage one on CPU actors: a supervised pool, and the engine's way to it.

The pool is plain named Ray actors, ``memshare-evaluator-0`` and so on. Whoever needs one looks it
up by name and makes it if it is missing; an actor lives as long as the process that made it:

- In the cluster that is :class:`EvaluatorPool`, a deployment of the same application. It starts in
  seconds, while engines load for much longer; its health check brings back actors that were killed
  for good; and when the application is deleted, or Ray Serve itself dies, the actors go with it.
  (Ray Serve's own deployment actors are still alpha, choose their names, do not let Ray restart
  them, and can't be made by an engine outside Ray Serve.)
- With plain vLLM beside a Ray cluster it is the engine itself, through :class:`RayCandidateSource`.

A crashed actor is restarted by Ray, with an empty memory: later steps find fewer partners for a
while, nothing else. Calls are never retried; a lost batch is worth less than a late one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorProxy
from ray.exceptions import (
    PendingCallsLimitExceeded,
    RayActorError,
    RayError,
)

from memshare.config import EvaluatorConfig, MemShareConfig
from memshare.search.evaluate import EvaluatorAnswer, EvaluatorError, NewSteps, open_stage_one

logger = logging.getLogger(__name__)


def actor_name(index: int) -> str:
    """Name of the pool's actor ``index``, in the namespace of the configuration."""
    return f"memshare-evaluator-{index}"


def seat_of(key: str, actors: int) -> int:
    """Index of the actor that remembers the history ``key``, out of so many actors."""
    # Alike in all bits, and repeatable, which hash() is not.
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % actors


class Evaluator:
    """One actor of the pool: stage one for the histories that are sent to it."""

    def __init__(self, config: MemShareConfig) -> None:
        self._stage_one = open_stage_one(config)

    @ray.method
    def evaluate(self, batch: Sequence[NewSteps]) -> EvaluatorAnswer:
        """See :meth:`memshare.search.evaluate.StageOne.evaluate`."""
        return self._stage_one.evaluate(batch)

    @ray.method
    def forget_histories(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """See :meth:`memshare.search.evaluate.CandidateSource.forget_histories`."""
        self._stage_one.forget_histories(histories, request_ids)

    @ray.method
    def ready(self) -> None:
        """Return once the actor takes calls."""


class ActorDirectory:
    """Finds the pool's actors by name and makes those that are missing.

    Holds on to what it made: an actor that is not detached ends with its first handle.
    """

    def __init__(self, config: MemShareConfig) -> None:
        self._config = config
        self._class = ray.remote(Evaluator)  # one for all: Ray exports each that it is given
        self._made: dict[int, ActorProxy[Evaluator]] = {}

    def __len__(self) -> int:
        """Actors in the pool."""
        return self._config.evaluator.actors

    def find(self, index: int) -> ActorProxy[Evaluator]:
        """The live (or restarting) actor ``index``.

        Raises:
            RayError: the Ray cluster does not answer.
        """
        pool = self._config.evaluator
        try:
            return cast("ActorProxy[Evaluator]", ray.get_actor(actor_name(index), pool.namespace))
        except ValueError:
            logger.info("making %s in namespace %r", actor_name(index), pool.namespace)
        options = self._class.options(
            name=actor_name(index),
            namespace=pool.namespace,
            get_if_exists=True,  # someone else may have been faster
            num_cpus=pool.cpus_per_actor,
            max_restarts=-1,
            max_task_retries=0,
            max_pending_calls=pool.max_pending_calls,
        )
        made = options.remote(self._config)
        self._made[index] = made
        return made


class EvaluatorPool:
    """The deployment that owns the actors. It serves nobody; its health check is its work."""

    def __init__(self, config: MemShareConfig) -> None:
        self._directory = ActorDirectory(config)
        self.check_health()

    def check_health(self) -> None:
        """Make the actors that are missing: at first all, later those that were killed for good."""
        for index in range(len(self._directory)):
            self._directory.find(index)

    async def ready(self) -> None:
        """Return once every actor takes calls."""
        found = [self._directory.find(index) for index in range(len(self._directory))]
        await asyncio.gather(*(actor.ready.remote() for actor in found))


@dataclass(slots=True)
class _Seat:
    """One actor of the pool, as one engine sees it."""

    index: int
    actor: ActorProxy[Evaluator] | None = None
    fault: EvaluatorError | None = None  # the latest
    rests_until: float = 0.0

    @property
    def name(self) -> str:
        return actor_name(self.index)


@dataclass(frozen=True, slots=True)
class _Call:
    """A batch under way."""

    seat: _Seat
    deadline: float


class RayCandidateSource:
    """Candidate source on the actor pool, for the bridge thread of an engine.

    All steps of one history go to one actor, which remembers them. Engines share the actors but
    never a history, for they can't share KV blocks. Nothing here waits for an actor;
    looking one up asks the Ray cluster and may take a moment, so a failed actor is left alone for
    ``retry_after_s`` before it is looked up again, and its batches are dropped meanwhile. Faults
    come back from :meth:`collect` as :class:`EvaluatorError`, one for each batch and actor:
    ``dead`` (crashed, killed, unreachable), ``busy`` (too many calls wait), ``timeout``,
    ``garbage`` (not an answer), ``error`` (the evaluator raised).
    """

    def __init__(self, config: MemShareConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Join the Ray cluster.

        Raises:
            EvaluatorError: ``dead``, there is no such cluster.
        """
        self._config = config
        self._clock = clock
        self._engine = uuid.uuid4().hex
        self._joined = _join(config.evaluator)
        self._directory = ActorDirectory(config)
        self._seats = [_Seat(index) for index in range(len(self._directory))]
        self._calls: dict[
            ray.ObjectRef[EvaluatorAnswer], _Call
        ] = {}  # in the order of their deadlines
        self._faults: deque[EvaluatorError] = deque()

    @property
    def pending(self) -> int:
        """See :attr:`memshare.search.evaluate.CandidateSource.pending`."""
        return len(self._calls) + len(self._faults)

    def submit(self, batch: Sequence[NewSteps]) -> None:
        """Send every history's steps to its actor. Never raises: faults come from ``collect``."""
        parts: dict[int, list[NewSteps]] = {}
        for steps in batch:
            mine = steps._replace(history=self._key(steps.history))
            parts.setdefault(self._index(mine.history), []).append(mine)
        for index, part in parts.items():
            self._send(self._seats[index], part)

    def collect(self) -> list[EvaluatorAnswer | EvaluatorError]:
        """See :meth:`memshare.search.evaluate.CandidateSource.collect`."""
        items: list[EvaluatorAnswer | EvaluatorError] = list(self._faults)
        self._faults.clear()
        if self._calls:
            waiting = list(self._calls)
            answered: list[ray.ObjectRef[EvaluatorAnswer]]
            answered, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            items += [self._outcome(ref, self._calls.pop(ref).seat) for ref in answered]
        return items + self._expired()

    def forget_histories(self, histories: Sequence[str], request_ids: Sequence[str]) -> None:
        """See :meth:`memshare.search.evaluate.CandidateSource.forget_histories`.

        An actor that can't be told forgets by itself: by its restart, or as least recently used.
        """
        parts: dict[int, list[str]] = {}
        for key in map(self._key, histories):
            parts.setdefault(self._index(key), []).append(key)
        # The shared histories are not named, so any actor may hold steps of these requests.
        indexes = range(len(self._seats)) if request_ids else parts
        for index in indexes:
            seat = self._seats[index]
            if seat.actor is None:
                continue
            try:
                seat.actor.forget_histories.remote(parts.get(index, []), request_ids)
            except RayError as error:
                self._leave_alone(seat, _fault(error, seat.name))

    def close(self) -> None:
        """See :meth:`memshare.search.evaluate.CandidateSource.close`. Ends the actors made here."""
        self._calls.clear()
        self._seats.clear()
        self._directory = ActorDirectory(self._config)
        if self._joined:
            ray.shutdown()

    def _key(self, history: str) -> str:
        return f"{self._engine}/{history}"

    def _index(self, key: str) -> int:
        return seat_of(key, len(self._seats))

    def _send(self, seat: _Seat, steps: list[NewSteps]) -> None:
        if seat.fault is not None and self._clock() < seat.rests_until:
            self._faults.append(EvaluatorError(seat.fault.reason, f"{seat.name} is left alone"))
            return
        try:
            if seat.actor is None:
                seat.actor = self._directory.find(seat.index)
            ref = seat.actor.evaluate.remote(steps)
        except RayError as error:
            self._faults.append(self._leave_alone(seat, _fault(error, seat.name)))
        else:
            deadline = self._clock() + self._config.evaluator.call_timeout_s
            self._calls[ref] = _Call(seat, deadline)

    def _outcome(
        self, ref: ray.ObjectRef[EvaluatorAnswer], seat: _Seat
    ) -> EvaluatorAnswer | EvaluatorError:
        try:
            answer = ray.get(ref)
        except RayError as error:
            return self._leave_alone(seat, _fault(error, seat.name))
        if EvaluatorAnswer.is_sound(answer):
            return answer
        return self._leave_alone(seat, EvaluatorError("garbage", f"{seat.name}: {answer!r:.200}"))

    def _expired(self) -> list[EvaluatorError]:
        now = self._clock()
        overdue: list[ray.ObjectRef[EvaluatorAnswer]] = []
        for ref, call in self._calls.items():
            if call.deadline > now:
                break
            overdue.append(ref)
        return [
            self._leave_alone(seat, EvaluatorError("timeout", f"{seat.name} did not answer"))
            for seat in [self._calls.pop(ref).seat for ref in overdue]
        ]

    def _leave_alone(self, seat: _Seat, fault: EvaluatorError) -> EvaluatorError:
        """Look the actor up again, but not before ``retry_after_s``; returns ``fault``."""
        seat.actor = None
        seat.fault = fault
        seat.rests_until = self._clock() + self._config.evaluator.retry_after_s
        return fault


def _fault(error: RayError, name: str) -> EvaluatorError:
    reason = "error"
    if isinstance(error, PendingCallsLimitExceeded):
        reason = "busy"
    elif isinstance(error, RayActorError):
        reason = "dead"
    return EvaluatorError(reason, f"{name}: {error!r:.200}")


def _join(pool: EvaluatorConfig) -> bool:
    """Connect this process to the Ray cluster, unless it is; True if it was done here."""
    if ray.is_initialized():
        return False
    if pool.address is not None:
        _require_listener(pool.address)
    with _own_signal_handlers():
        try:
            ray.init(
                address=pool.address or "auto",
                namespace=pool.namespace,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, RayError) as error:
            raise EvaluatorError("dead", f"no Ray cluster to join: {error}") from error
    return True


def _require_listener(address: str) -> None:
    """Fail at once where ``ray.init`` would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3.0).close()
    except (OSError, ValueError) as error:
        raise EvaluatorError("dead", f"no Ray cluster at {address!r}: {error}") from error


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the engine's handler of SIGTERM, which ``ray.init`` replaces in a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
