"""``python -m cluster.run FILE``: ``serve run FILE``, which leaves with care.

Told to end, by Ctrl-C or SIGTERM, ``serve run`` ends its proxies at once and streams with them.
Here requests that are under way may finish first, for as long as
``replica.graceful_shutdown_timeout_s`` says, while new ones get HTTP 503 or gRPC ``UNAVAILABLE``
with the time to come again. A second Ctrl-C or SIGTERM cuts them off.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.scripts import run as serve_run

logger = logging.getLogger(__name__)

_POLL_S = 0.3
_CALL_S = 5.0  # a replica that does not answer in time has nothing that could be waited for
_FLUSH_S = 0.5  # for the last words of a stream to pass the proxy


def drain(handles: list[DeploymentHandle[Any]]) -> None:
    """Close every replica for new requests, and wait until those under way have ended.

    Args:
        handles: one of each deployment that has the methods ``close`` and ``under_way`` of
            :class:`cluster.replica.EngineReplica`.
    """
    grace = max(_of_all(handles, "close"), default=0.0)
    end = time.monotonic() + grace
    if running := sum(_of_all(handles, "under_way")):
        logger.warning("%d running requests may finish, within %g s", running, grace)
    while running and time.monotonic() < end:
        time.sleep(_POLL_S)
        running = sum(_of_all(handles, "under_way"))
    if running:
        logger.warning("%d requests have not finished in time", running)
    time.sleep(_FLUSH_S)


def _of_all(handles: list[DeploymentHandle[Any]], method: str) -> Iterator[float]:
    for handle in handles:
        try:
            yield from handle.broadcast(method).results(timeout_s=_CALL_S)
        except (RayError, RayServeException, TimeoutError, AttributeError) as error:
            logger.warning("%s of %s: %r", method, handle.deployment_name, error)


def _applications() -> list[DeploymentHandle[Any]]:
    return [serve.get_app_handle(name) for name in serve.status().applications]


def run(start: Callable[[], None]) -> None:
    """Serve until a signal comes; then leave.

    Args:
        start: starts the applications, and returns.
    """
    # Both signals are one exception from here on, also while Ray starts.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # the second one: enough
            drain(_applications())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the rest takes seconds
    serve.shutdown()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("config", type=Path, help="a configuration of Ray Serve")
    args = parser.parse_args()
    with contextlib.suppress(click.Abort):  # Ctrl-C before anything was started
        run(lambda: serve_run.main([str(args.config), "--non-blocking"], standalone_mode=False))


if __name__ == "__main__":
    main()
