"""A recorded replica for the page, and a visit of the page."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Page

from cluster.dashboard.records import BlockTrace, ReplicaReport, ReplicaSample, Reuse
from tests.cluster.dashboard.page.serving import PageServer

RECORDED: dict[str, Any] = json.loads(
    Path(__file__).with_name("recorded.json").read_text(encoding="utf-8")
)
ARGUMENTS: dict[str, object] = {"model": "some/model", "served_model_name": "smollm2"}


def recorded(name: str, count: int, now: float) -> ReplicaReport:
    """The recorded replica under another name, its samples repeated as often as needed."""
    replica = RECORDED["replica"]
    shift = random.Random(name).randrange(len(replica["samples"]))
    samples = [
        ReplicaSample(*replica["samples"][(i + shift) % len(replica["samples"])])._replace(
            time=now - count + i
        )
        for i in range(count)
    ]
    return ReplicaReport(
        name, "node", now, replica["blocks"], samples, replica["kinds"], replica["requests"], []
    )


def quiet(count: int, now: float) -> list[ReplicaSample]:
    """Samples without any event."""
    calm = ReplicaSample(0.0, 0.6, 4, 0, 40, 0, 0, 0, 0, 0, None)
    return [calm._replace(time=now - count + i) for i in range(count)]


def colour_in(page: Page, name: str) -> list[int]:
    """How many pixels of the usage chart have a colour of the page, by column."""
    found: list[int] = page.evaluate(
        """(name) => {
            const probe = document.body.appendChild(document.createElement("i"));
            probe.style.color = `var(--${name})`;
            const wanted = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
            probe.remove();
            const canvas = document.querySelector(".card canvas.usage");
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            const columns = new Array(width).fill(0);
            for (let i = 0; i < data.length; i += 4) {
                const close = wanted.every((value, c) => Math.abs(data[i + c] - value) < 12);
                if (close && data[i + 3] > 200) columns[(i / 4) % width] += 1;
            }
            return columns;
        }""",
        name,
    )
    return found


def recorded_trace() -> BlockTrace:
    trace = dict(RECORDED["trace"])
    trace["reused"] = [Reuse(*row) for row in trace["reused"]]
    return BlockTrace(**trace)


class Visit:
    """A page that is open, and what went wrong on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.urls: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._note)
        page.on("request", lambda request: self.urls.append(request.url))

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)


@contextmanager
def visiting(browser: BrowserContext, server: PageServer) -> Iterator[Visit]:
    page = browser.new_page()
    try:
        visit = Visit(page)
        page.goto(server.url)
        yield visit
    finally:
        page.close()
