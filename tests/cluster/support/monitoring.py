"""What the tests of the shared server ask of the live page, spans, log lines and exporters."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import ray

from cluster.check.ports import Serving
from tests.cluster.dashboard.page.browsing import open_browser
from tools.bench.local_cluster import Server

_DRAWING_MS = 120_000  # of a picture: the browser draws it on the cores that the engine has


def serving_of(server: Server) -> Serving:
    """Where a server of the tests is, as ``memshare check`` reads it from its file."""
    url = urlsplit(server.url)
    assert url.hostname is not None
    assert url.port is not None
    port = int(server.grpc_address.rpartition(":")[2])
    return Serving("memshare", "/", "smollm2", (url.hostname, url.port), ("0.0.0.0", port))


def wait_for(what: str, found: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    """The first answer of ``found`` that counts as true."""
    end = time.monotonic() + timeout_s
    while not (answer := found()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.2)
    return answer


@contextmanager
def writing(client: openai.OpenAI, **request: Any) -> Iterator[threading.Event]:
    """A streamed request that is under way; sets the event if it ended or failed by itself."""
    ended, leave = threading.Event(), threading.Event()

    def read() -> None:
        with client.chat.completions.create(stream=True, **request) as stream:
            for _ in stream:
                if leave.is_set():
                    return
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield ended
    finally:
        leave.set()
        reader.join(timeout=60)


def look_at_page(url: str, chromium: str, folder: Path, word: str) -> None:
    """Open the page while a request is written; see its card, its row and its trace.

    Args:
        url: of the server.
        chromium: the browser.
        folder: gets pictures, and what the API says.
        word: one of the request's prompt.
    """
    with open_browser(chromium) as browser:
        page = browser.new_page()
        errors: list[str] = []
        urls: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: urls.append(request.url))
        page.goto(f"{url}/memshare/")
        page.wait_for_selector(".card canvas", timeout=60_000)
        page.wait_for_function(
            """() => [...document.querySelectorAll("#requests tbody tr")]
                .some((row) => parseInt(row.cells[5].textContent) > 0)""",
            timeout=120_000,
        )
        page.screenshot(path=folder / "page.png", full_page=True, timeout=_DRAWING_MS)
        page.locator("#requests tbody button").first.click()
        page.wait_for_selector("#trace-strip .arc", state="attached", timeout=60_000)
        page.screenshot(path=folder / "trace.png", full_page=True, timeout=_DRAWING_MS)
        assert page.locator("#trace-strip .cell.given-up").count() > 0
        assert word in page.locator("#trace-text").inner_text()
        assert "running" in page.locator(".card .now").inner_text()
        assert page.locator(".card .kinds").is_visible()
        button = page.locator("#requests tbody button").first
        query = {name: button.get_attribute(f"data-{name}") for name in ("replica", "request")}
        for name, parameters in (("state", {}), ("trace", query)):
            answer = httpx.get(f"{url}/memshare/api/{name}", params=parameters, timeout=60)
            assert answer.status_code == 200
            (folder / f"{name}.json").write_text(answer.text)
        assert errors == []
        assert [asked for asked in urls if not asked.startswith(url)] == []


def node_metrics() -> str:
    """What this machine's Ray node exports."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    return httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=60).text


def json_lines(session: Path) -> list[dict[str, Any]]:
    """MemShare's log lines of all workers of a Ray session."""
    found = []
    for file in (session / "logs").glob("worker-*.err"):
        for line in file.read_text(errors="replace").splitlines():
            _, brace, rest = line.partition("{")  # vLLM puts the process's name before it
            try:
                record = json.loads(brace + rest)
            except json.JSONDecodeError:
                continue
            if str(record.get("logger", "")).startswith("memshare"):
                found.append(record)
    return found
