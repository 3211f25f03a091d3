"""The page's real app and real board in this process, in front of samples that a test provides.

What is missing is Ray Serve: :class:`LocalBoard` stands in for the handle of its deployment.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import uvicorn
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.routing import Mount

from cluster.config import PageConfig, parse_cluster_args, without_secrets
from cluster.dashboard.hub import DashboardHub
from cluster.dashboard.records import BlockTrace, ReplicaReport
from cluster.dashboard.routes import PREFIX, page_app


@dataclass
class _Method:
    call: Callable[..., Any]

    async def remote(self, *arguments: object) -> Any:
        return await self.call(*arguments)


class LocalBoard:
    """Stand-in for a deployment handle: calls the board where it is."""

    def __init__(self, board: DashboardHub) -> None:
        self._board = board
        self.broken = False

    def __getattr__(self, name: str) -> _Method:
        if self.broken:
            raise ConnectionError("the board is away")
        return _Method(getattr(self._board, name))


@dataclass
class PageServer:
    """A running page."""

    url: str
    handle: LocalBoard
    faults: list[str]
    traces: dict[tuple[str, str], BlockTrace] = field(default_factory=dict)
    went_on: list[str] = field(default_factory=list)

    def report(self, report: ReplicaReport) -> None:
        """Tell the board, as a replica does, and deliver what it wants."""

        async def tell() -> None:
            wishes = await self.handle.report.remote(report)
            if wishes.go_on:
                self.went_on.append(report.replica)
            for request in wishes.traces:
                trace = self.traces.get((report.replica, request))
                await self.handle.deliver.remote(report.replica, request, trace)

        asyncio.run_coroutine_threadsafe(tell(), self.loop).result(timeout=10)

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)


@contextmanager
def serve_page(page: PageConfig, arguments: dict[str, object]) -> Iterator[PageServer]:
    """Serve the page on a free port of this machine.

    Args:
        page: of the board.
        arguments: of the application, whose configuration is shown.
    """
    handle = LocalBoard(DashboardHub(page))
    faults: list[str] = []
    shown = without_secrets(parse_cluster_args(arguments, environ={})).model_dump(mode="json")
    app = page_app(cast("DeploymentHandle[Any]", handle), shown, faults.append)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(Starlette(routes=[Mount(PREFIX, app)]), log_level="warning")
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(server.serve(sockets=[listener]))
    )
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = listener.getsockname()[1]
        yield PageServer(f"http://127.0.0.1:{port}{PREFIX}/", handle, faults, loop=loop)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
