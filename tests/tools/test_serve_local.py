"""How ``make serve`` starts, waits and ends (tools/serve_local.py); signals are in
tests/tools/test_serve_setup.py. Stand-ins: servers that answer as told, and children that only end.
"""

from __future__ import annotations

import importlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.documents import ROOT
from tools.bench.local_cluster import free_port


@pytest.fixture(scope="module")
def local() -> Iterator[Any]:
    """The program, which imports its neighbours as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("tools.serve_local")


@pytest.fixture(autouse=True)
def log(local: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "run" / "serve.log"
    monkeypatch.setattr(local, "LOG", file)
    monkeypatch.setattr(local, "ROOT", tmp_path)
    file.parent.mkdir()
    file.write_text("a line\nthe last line\n")
    return file


@contextmanager
def answers(status: int) -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers with this status; its URL, and the keys that it was shown."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"body")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", keys
        server.shutdown()


def child(status: int | None = None) -> Any:
    return SimpleNamespace(poll=lambda: status, returncode=status)


def read_log(**found: object) -> Callable[[Path], Any]:
    """In place of ServeLog: what the log says."""
    said = {"build_failed": False, "replica_failures": 0, "reason": "why", "read_on": lambda: None}
    return lambda path: SimpleNamespace(**said | found)


def test_a_port_that_is_taken_is_named_with_its_section(local: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(local.ServeError, match=rf"port {port} is in use.*`grpc_options`"):
            local.require_free_port(port, "grpc_options")
    local.require_free_port(free_port(), "grpc_options")


def test_only_200_is_an_answer_and_no_proxy_stands_between(
    local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("http_proxy", nobody)
    monkeypatch.delenv(local.KEY, raising=False)
    with answers(200) as (url, keys):
        assert local.fetch(url) == b"body"
        monkeypatch.setenv(local.KEY, "msk_1")
        assert local.fetch(url) == b"body"
        assert keys == [None, "Bearer msk_1"]
    with answers(503) as (url, _):
        assert local.fetch(url) is None
    assert local.fetch(nobody) is None


def test_it_waits_until_health_is_200(local: Any) -> None:
    with answers(200) as (url, _):
        assert local.wait_until_healthy(child(), url, minutes=5) >= 0


@pytest.mark.parametrize(
    ("process", "found", "minutes", "told"),
    [
        (child(3), {}, 5, r"ended during start-up \(exit 3\)"),
        (child(), {"build_failed": True}, 5, "cannot be built: why"),
        (child(), {"replica_failures": 2}, 5, "a replica cannot start: why"),
        (child(), {"replica_failures": 1}, 0, "not healthy within 0 minutes"),
    ],
)
def test_a_start_that_cannot_succeed_ends_at_once(
    local: Any,
    monkeypatch: pytest.MonkeyPatch,
    process: Any,
    found: dict[str, Any],
    minutes: float,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local, "ServeLog", read_log(**found))
    monkeypatch.setattr(local, "watch_health", lambda url: threading.Event())
    with pytest.raises(local.ServeError, match=told):
        local.wait_until_healthy(process, "http://127.0.0.1:1", minutes)
    tried_again = "a replica failed to start, Ray tries again (see run/serve.log)"
    assert (tried_again in capsys.readouterr().out) == (found.get("replica_failures") == 1)


def test_a_pipe_gets_a_line_now_and_then(local: Any, capsys: pytest.CaptureFixture[str]) -> None:
    progress = local.StartProgress()
    for seconds in (1.0, 9.9, 10.0, 19.0, 20.4):
        progress.show(seconds)
    progress.clear()
    assert capsys.readouterr().out == "[serve] starting: 10 s\n[serve] starting: 20 s\n"


def test_a_server_that_does_not_end_is_killed(
    local: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "SHUTDOWN_SECONDS", 0.1)
    program = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "print('ready', flush=True); time.sleep(600)"
    )
    before = {number: signal.getsignal(number) for number in local.STOP_SIGNALS}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as deaf:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        try:
            local.stop(deaf, grace=0.0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        assert deaf.returncode == -signal.SIGKILL
    assert "not gone in time: killing it" in capsys.readouterr().out


def test_a_server_that_has_ended_is_left_alone(
    local: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    local.stop(child(0), grace=5.0)
    assert capsys.readouterr().out == "[serve] stopped\n"


def test_what_went_wrong_is_told_with_the_end_of_the_log(
    local: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(config: Path, minutes: float) -> None:
        raise local.ServerFailedError("a replica cannot start: no memory")

    monkeypatch.setattr(local, "serve", serve)
    monkeypatch.setattr(sys, "argv", ["serve_local.py"])
    assert local.main() == 1
    told = capsys.readouterr().err
    assert "----- end of run/serve.log -----\na line\nthe last line" in told
    assert told.endswith("[serve] ERROR: a replica cannot start: no memory\n")


def test_where_a_server_runs_already_another_leaves_its_log_alone(
    local: Any, log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = log.read_text()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        setup = SimpleNamespace(http=taken.getsockname()[1], grpc=None)
        monkeypatch.setattr(local, "read_setup", lambda config: setup)
        monkeypatch.setattr(sys, "argv", ["serve_local.py"])
        assert local.main() == 1
    told = capsys.readouterr().err
    assert "is in use by another program, perhaps another `make serve`" in told
    assert "end of" not in told
    assert log.read_text() == before
