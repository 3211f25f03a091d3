"""``python -m cluster.run FILE``: ``serve run FILE``, which leaves with care.

Told to end, by Ctrl-C or SIGTERM, ``serve run`` ends its proxies at once and streams with them.
Here requests that are under way may finish first, for as long as
``replica.graceful_shutdown_timeout_s`` says, while new ones get HTTP 503 or gRPC ``UNAVAILABLE``
with the time to come again. A second Ctrl-C or SIGTERM cuts them off.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.scripts import run as serve_run

from cluster.processes.closing import drain


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
