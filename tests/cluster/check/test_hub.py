"""What ``memshare check`` does without the hub, and what it says meanwhile (cluster/check)."""

from __future__ import annotations

import io
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.check.hub import ask, is_on_hub, look_at_hub
from cluster.check.progress import CheckProgress

MODEL = "some-owner/some-model-that-is-nowhere"


class Refusing(BaseHTTPRequestHandler):
    """A hub that knows nothing, and counts who asks."""

    asked = 0

    def do_HEAD(self) -> None:
        type(self).asked += 1
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@contextmanager
def hub() -> Iterator[str]:
    Refusing.asked = 0
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No offline switch, and none that stays."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)


def test_hub_ids_are_told_from_what_is_here(tmp_path: Path) -> None:
    assert is_on_hub("Qwen/QwQ-32B")
    assert is_on_hub("gpt2")
    for here in (
        "smollm2-135m",
        "smollm2-135m-tp2",
        str(tmp_path),
        "./model",
        "/models/x",
        "a/b/c",
    ):
        assert not is_on_hub(here), here


def test_a_hub_that_answers_is_asked_once_and_judges_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hub() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert look_at_hub(MODEL) is None
    assert Refusing.asked == 1


def test_without_the_hub_there_is_one_try_and_one_line(
    monkeypatch: pytest.MonkeyPatch, nowhere: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    began = time.monotonic()
    found = look_at_hub(MODEL)
    assert time.monotonic() - began < 60
    assert found is not None
    assert found.level == "fail"
    assert MODEL in found.text
    assert f"{nowhere} cannot be asked (Connection refused)" in found.text
    assert f"hf download {MODEL}" in found.fix
    assert os.environ["HF_HUB_OFFLINE"] == "1", "vLLM would try again and again"


def test_a_hub_that_hangs_costs_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        began = time.monotonic()
        assert ask(url, timeout_s=0.2) is not None
        assert time.monotonic() - began < 60


def test_what_the_cache_holds_is_enough(
    monkeypatch: pytest.MonkeyPatch, nowhere: str, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    commit = tmp_path / "models--some-owner--some-model-that-is-nowhere" / "snapshots" / "abc"
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    refs = commit.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    found = look_at_hub(MODEL)
    assert found is not None
    assert (found.level, "cache" in found.text) == ("warn", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look_at_hub(MODEL) is None, "that is how it is wanted"
    missing = look_at_hub(MODEL, "another-revision")
    assert missing is not None
    assert missing.fix.startswith("unset HF_HUB_OFFLINE")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_live_line_on_a_terminal() -> None:
    stream = Terminal()
    with CheckProgress(stream) as progress:
        progress.say("the model")
        end = time.monotonic() + 30
        while not re.search(r"\r\x1b\[Klooking at the model \(\d+ s\)", stream.getvalue()):
            assert time.monotonic() < end
            time.sleep(0.05)
        progress.say("the ports")
    written = stream.getvalue()
    assert "\n" not in written
    assert written.endswith("looking at the ports\r\x1b[K"), "nothing stays"


def test_progress_is_lines_elsewhere() -> None:
    stream = io.StringIO()
    with CheckProgress(stream) as progress:
        progress.say("the model")
        progress.say("")
        progress.say("the ports")
    assert stream.getvalue() == "looking at the model\nlooking at the ports\n"
