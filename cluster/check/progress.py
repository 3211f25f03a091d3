"""What is being looked at, live on standard error: looking takes half a minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

Say = Callable[[str], None]
"""Takes what is looked at next."""

_EVERY_S = 0.5


class CheckProgress:
    """One line, rewritten with the seconds it has taken; where that isn't a terminal, one each."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to ``stream``, standard error by default."""
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._lock = threading.Lock()
        self._what = ""
        self._since = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def say(self, what: str) -> None:
        """Begin to look at something else; at nothing, where others write their own progress."""
        with self._lock:
            self._what, self._since = what, time.monotonic()
            if self._live:
                self._draw()
            elif what:
                print(f"looking at {what}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        """Keep the line up to date."""
        if self._live:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave a terminal as if nothing had been there."""
        self._ended.set()
        if self._live:
            self._thread.join()
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _tick(self) -> None:
        while not self._ended.wait(_EVERY_S):
            with self._lock:
                if self._what:
                    self._draw()

    def _draw(self) -> None:
        seconds = time.monotonic() - self._since
        took = f" ({int(seconds)} s)" if seconds >= 1 else ""
        self._stream.write(f"\r\x1b[K{f'looking at {self._what}{took}' if self._what else ''}")
        self._stream.flush()
