"""One line for each HTTP request and each gRPC call, in Ray Serve's log of the replica.

Ray Serve's own line there knows neither path nor tenant. Ours takes its place, and is left out with
it by Serve's ``enable_access_log: false``. The request's id is added by Serve's formatter; with its
``encoding: JSON`` what a line tells is also there as fields.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote

_SERVE = logging.getLogger("ray.serve")
_SAFE = "/:@!$&'()*+,;=~"  # as in a URL: no space, and nothing that ends a line
_MOST = 200  # letters of a path; a client may send thousands


@dataclass
class Line:
    """What is told of a request; filled in while it is answered."""

    method: str
    path: str
    tenant: str = "-"
    """``-`` as long as nobody knows."""
    status: str = "-"
    """``-`` if nothing was answered."""
    aborted: bool = False
    """The client left before the answer had ended."""
    engine_id: str = ""
    """The request's id in the engine, where the request's own is no part of it."""

    def __str__(self) -> str:
        """Without the time, which :func:`access_line` adds."""
        words = [self.method, quote(self.path[:_MOST], safe=_SAFE), self.status]
        words += ["aborted"] if self.aborted else []
        words += [f"tenant={self.tenant}"]
        words += [f"request={self.engine_id}"] if self.engine_id else []
        return " ".join(words)


@contextmanager
def access_line(method: str, path: str) -> Iterator[Line]:
    """Around a request, however it ends.

    Args:
        method: ``POST`` and so on; ``gRPC`` for calls.
        path: as the client sent it.
    """
    line = Line(method, path)
    began = time.monotonic()
    try:
        yield line
    except (asyncio.CancelledError, GeneratorExit):
        line.aborted = True
        raise
    finally:
        took_ms = round(1000 * (time.monotonic() - began), 1)
        fields = {
            "serve_access_log": True, "method": line.method, "path": line.path[:_MOST],
            "status": line.status, "aborted": line.aborted, "tenant": line.tenant,
            "engine_id": line.engine_id, "duration_ms": took_ms,
        }  # fmt: skip
        _SERVE.info("%s %sms", line, took_ms, extra=fields)
