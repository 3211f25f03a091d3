"""The page's HTTP app in front of a real board; without a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import cluster.dashboard
from cluster.config import PageConfig
from cluster.dashboard.records import BlockTrace, ReplicaReport, ReplicaSample, Reuse
from memshare.telemetry.metrics import BLOCKS
from tests.cluster.dashboard.page.serving import PageServer, serve_page

STATIC = Path(cluster.dashboard.__file__).with_name("static")
ARGUMENTS: dict[str, object] = {
    "model": "some/model",
    "engine": {"extra": {"api_key": "sesame", "max_logprobs": 5}},
    "replica": {"env": {"HF_TOKEN": "sesame"}},
}


def report(*samples: ReplicaSample) -> ReplicaReport:
    return ReplicaReport("replica-1", "node", 5.0, 50, list(samples), {"free": 50}, [])


SAMPLE = ReplicaSample(9.0, 0.5, 1, 0, 3, 0, 0, 0, 0, 0, None)


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with serve_page(PageConfig(), ARGUMENTS) as server:
        yield server


def get(server: PageServer, path: str) -> httpx.Response:
    return httpx.get(server.url + path, timeout=20)


def test_the_files_need_nothing_from_elsewhere(server: PageServer) -> None:
    for file in STATIC.iterdir():
        answer = get(server, file.name)
        assert answer.status_code == 200
        assert answer.text == file.read_text(encoding="utf-8")
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        links = re.findall(r"https?://[^\s\"')]+", answer.text)
        assert [link for link in links if not link.startswith("http://www.w3.org/")] == []
    assert get(server, "").text == (STATIC / "index.html").read_text(encoding="utf-8")
    assert get(server, "../replica.py").status_code == 404


def test_state_and_what_is_new_since(server: PageServer) -> None:
    server.report(report(SAMPLE))
    first = get(server, "api/state").json()
    assert first["fields"] == list(ReplicaSample._fields)
    (replica,) = first["replicas"]
    assert replica["samples"][-1] == list(SAMPLE)
    again = get(server, f"api/state?board={first['board']}&after={first['number']}").json()
    assert again["replicas"][0]["samples"] == []
    assert get(server, "api/state?after=x").status_code == 400


def test_secrets_are_masked(server: PageServer) -> None:
    answer = get(server, "api/config")
    assert "sesame" not in answer.text
    assert answer.json()["engine"]["extra"] == {"api_key": "***", "max_logprobs": 5}
    assert answer.json()["replica"]["env"] == {"HF_TOKEN": "***"}


def test_a_trace(server: PageServer) -> None:
    trace = BlockTrace("a", True, 4, 6, 16, [Reuse(1, 2, None, 5.0)], [7.0], ["<b>", "x"])
    server.traces["replica-1", "a"] = trace
    server.report(report())
    with httpx.Client(timeout=20) as client:
        import threading

        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(
                client.get(f"{server.url}api/trace?replica=replica-1&request=a")
            )
        )
        asking.start()
        while asking.is_alive():
            server.report(report())
        asking.join()
    assert answers[0].json()["reused"] == [[1, 2, None, 5.0]]
    assert answers[0].json()["texts"] == ["<b>", "x"]
    assert get(server, "api/trace?replica=nobody&request=a").status_code == 404


def test_a_board_that_is_away_is_counted_and_said(server: PageServer) -> None:
    server.handle.broken = True
    try:
        answer = get(server, "api/state")
    finally:
        server.handle.broken = False
    assert answer.status_code == 503
    assert "serving goes on" in answer.json()["error"]
    assert server.faults == ["answer"]
    assert get(server, "").status_code == 200, "the page itself still loads"


def test_the_page_knows_every_kind_of_block() -> None:
    script = (STATIC / "cards.js").read_text(encoding="utf-8")
    (listed,) = re.findall(r"const KINDS = \{(.*?)\};", script, re.DOTALL)
    (label,) = BLOCKS.labels
    assert set(re.findall(r"(\w+):", listed)) == set(label.values)
    style = (STATIC / "page.css").read_text(encoding="utf-8")
    assert all(f".kind-{kind}" in style for kind in label.values)
