"""The event log: every transition as one JSON line, written off the engine's thread."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

logger = logging.getLogger(__name__)

EventKind = Literal[
    "started", "step", "candidate", "compared", "verified", "rejected", "applied", "compacted",
    "dropped", "preempted", "finished", "opted_out", "evaluator_fault", "integrity",
]  # fmt: skip
EventValue = str | int | float | bool | None

_MAX_WAITING = 65536  # lines; a disk that can't keep up costs events, not serving


class EventLog:
    """Appends events to a file from a thread of its own.

    Every line holds ``t`` (seconds since the epoch) and ``event``; the rest depends on the kind
    (docs/metrics.md).
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` for appending.

        Raises:
            OSError: it cannot be opened.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._waiting: SimpleQueue[dict[str, EventValue] | None] = SimpleQueue()
        self._dropped = 0  # by the engine's thread
        self._lost = 0  # by the writing thread; ever
        self._lost_taken = 0
        self._thread = threading.Thread(target=self._write, name="memshare-events", daemon=True)
        self._thread.start()

    def record(self, event: EventKind, **fields: EventValue) -> None:
        """Log one transition; dropped and counted if the disk lags behind."""
        if self._waiting.qsize() >= _MAX_WAITING:
            self._dropped += 1
            return
        self._waiting.put({"t": time.time(), "event": event, **fields})

    def take_dropped(self) -> int:
        """Lines that were dropped, or could not be written, since the last call."""
        lost = self._lost
        dropped = self._dropped + lost - self._lost_taken
        self._dropped, self._lost_taken = 0, lost
        return dropped

    def close(self) -> None:
        """Write what is waiting and close the file. Idempotent."""
        self._waiting.put(None)
        self._thread.join(timeout=5.0)

    def _write(self) -> None:
        while (event := self._waiting.get()) is not None:
            try:
                self._file.write(json.dumps(event, separators=(",", ":")) + "\n")
                if self._waiting.empty():
                    self._file.flush()
            except OSError as error:  # the disk is full, say; it may not stay so
                self._note_loss(error)
        try:
            self._file.close()
        except OSError as error:
            self._note_loss(error)

    def _note_loss(self, error: OSError) -> None:
        if not self._lost:
            logger.warning("event log: %s; lines are missing from now on", error)
        self._lost += 1
