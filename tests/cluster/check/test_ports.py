"""Who listens on an application's ports, as ``memshare check`` tells it (cluster/check/ports.py).

The page's files and the gRPC stubs are the product's; the proxy around them is a stand-in for Ray
Serve's. ``tests/cluster`` asks real servers, with and without keys.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import grpc
import pytest

import cluster.dashboard
from cluster.check.ports import Serving, look_at_ports
from memshare.proto import memshare_pb2 as pb
from memshare.proto.memshare_pb2_grpc import MemShareServicer, add_MemShareServicer_to_server

PAGE = Path(cluster.dashboard.__file__).with_name("static") / "index.html"
ROUTES = json.dumps({"/": "memshare"})
MODELS = json.dumps({"object": "list", "data": [{"id": "smollm2"}]})
NO_KEY = json.dumps({"error": {"code": "invalid_api_key"}})

Answers = dict[str, tuple[int, str]]
OPEN: Answers = {
    "/-/routes": (200, ROUTES), "/memshare/": (200, PAGE.read_text()), "/v1/models": (200, MODELS),
}  # fmt: skip
WITH_KEYS: Answers = OPEN | {"/v1/models": (401, NO_KEY)}
# As cluster/http/proxy.py answers, in proxies that have it.
CLOSED: Answers = WITH_KEYS | {"/-/routes": (404, '{"error": {"message": "/-/routes is closed"}}')}
NO_PAGE: Answers = {name: answer for name, answer in WITH_KEYS.items() if name != "/memshare/"}


@contextmanager
def http(answers: Answers) -> Iterator[int]:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, "not found"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    server = HTTPServer(("127.0.0.1", 0), Proxy)
    thread = Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Servicer(MemShareServicer):
    """Answers, or refuses with ``code``."""

    def __init__(self, code: grpc.StatusCode | None = None, details: str = "") -> None:
        self.code, self.details = code, details

    def GetModelInfo(  # noqa: N802 - the method's name
        self, request: pb.GetModelInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetModelInfoResponse:
        assert ("application", "memshare") in context.invocation_metadata()
        if self.code is not None:
            context.abort(self.code, self.details)
        return pb.GetModelInfoResponse(model="smollm2")


@contextmanager
def rpc(servicer: Servicer | None) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    if servicer is not None:
        add_MemShareServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def serving(http_port: int, grpc_port: int | None = None, model: str = "smollm2") -> Serving:
    host = "127.0.0.1"
    where = None if grpc_port is None else ("0.0.0.0", grpc_port)
    return Serving("memshare", "/", model, (host, http_port), where)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_free_ports_are_free(free_port: int) -> None:
    (found,), runs = look_at_ports(serving(free_port))
    assert (found.level, found.text, runs) == ("ok", f"port {free_port} (HTTP) is free", False)


@pytest.mark.parametrize(
    ("answers", "model", "level", "says", "runs"),
    [
        (OPEN, "smollm2", "ok", "a MemShare server answers there, model smollm2", True),
        (WITH_KEYS, "smollm2", "ok", "a MemShare server answers there", True),
        (NO_PAGE, "smollm2", "ok", "a MemShare server answers there", True),
        (CLOSED, "smollm2", "ok", "a MemShare server answers there", True),
        (CLOSED | {"/v1/models": (503, "")}, "smollm2", "warn", "not ready (HTTP 503)", True),
        (OPEN, "other", "warn", "with the model smollm2 instead of other", True),
        (OPEN | {"/v1/models": (503, "")}, "smollm2", "warn", "not ready (HTTP 503)", True),
        ({"/-/routes": (200, '{"/": "shop"}')}, "smollm2", "fail", "'shop' at /", False),
        ({"/-/routes": (200, '{"/x": "shop"}')}, "smollm2", "fail", "'shop' at /x", False),
        ({"/-/routes": (200, "{}")}, "smollm2", "fail", "with no application", False),
        (
            {"/-/routes": (503, "Route table is not populated yet.")},
            "smollm2", "warn", "serves nothing yet", True,
        ),
        ({"/": (200, "<title>MemShare</title>")}, "smollm2", "fail", "no MemShare server", False),
        ({"/-/routes": (200, "[1]")}, "smollm2", "fail", "no MemShare server", False),
        (OPEN | {"/v1/models": (200, '{"data": 7}')}, "smollm2", "ok", "answers there", True),
    ],
)  # fmt: skip
def test_whoever_answers_on_http_is_named(
    answers: Answers, model: str, level: str, says: str, runs: bool
) -> None:
    with http(answers) as port:
        (found,), seen = look_at_ports(serving(port, model=model))
    assert (found.level, says in found.text, seen) == (level, True, runs), found
    assert found.text.startswith(f"port {port} (HTTP)")
    assert bool(found.fix) == (level != "ok")


@pytest.mark.parametrize(
    ("servicer", "level", "says"),
    [
        (Servicer(), "ok", "a MemShare server answers there, model smollm2"),
        (Servicer(grpc.StatusCode.UNAUTHENTICATED), "ok", "a MemShare server answers there"),
        (Servicer(grpc.StatusCode.NOT_FOUND, "Application 'memshare' not found."), "fail", "Ray"),
        (Servicer(grpc.StatusCode.INTERNAL), "fail", "no MemShare server"),
        (None, "fail", "no MemShare server"),
    ],
)
def test_whoever_answers_on_grpc_is_named(
    servicer: Servicer | None, level: str, says: str, free_port: int
) -> None:
    with rpc(servicer) as port:
        (_, found), runs = look_at_ports(serving(free_port, port))
    assert (found.level, says in found.text, runs) == (level, True, level == "ok"), found
    assert found.text.startswith(f"port {port} (gRPC)")


def test_a_program_that_says_nothing_is_no_server(free_port: int, quick: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        (found,), runs = look_at_ports(serving(deaf.getsockname()[1]))
    assert (found.level, runs) == ("fail", False)
    assert found.fix


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.check.ports._ANSWER_S", 0.2)


def test_the_servers_other_port_may_be_free(free_port: int) -> None:
    with http(OPEN) as port:
        (_, found), runs = look_at_ports(serving(port, free_port))
    assert runs
    assert found.level == "ok"
    assert "served without this one" in found.text
