"""What the page shows of a mixture of experts, in a real browser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import BrowserContext, expect

from cluster.config import PageConfig
from cluster.dashboard.records import ExpertUse
from tests.cluster.dashboard.page.browsing import open_browser
from tests.cluster.dashboard.page.recorded import ARGUMENTS, recorded, visiting
from tests.cluster.dashboard.page.serving import PageServer, serve_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[BrowserContext]:
    with open_browser(chromium) as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[PageServer]:
    with serve_page(PageConfig(), ARGUMENTS) as server:
        yield server


def test_experts_that_are_counted_have_a_table(browser: BrowserContext, server: PageServer) -> None:
    """A row for each replica; no table where nobody counts."""
    counts = ARGUMENTS | {"memshare": {"mode": "off", "experts": {"count_every": 16}}}
    used = {"0": ExpertUse(10, 60, 160, 1.5), "3": ExpertUse(10, 40, 160, 2.25)}
    with serve_page(PageConfig(), counts) as counting:
        for name, experts in (("replica-0", used), ("replica-1", {})):
            counting.report(replace(recorded(name, 60, time.time()), experts=experts))
        with visiting(browser, counting) as visit:
            rows = visit.page.locator("#experts tbody tr")
            expect(rows).to_have_count(2)
            cells = [row.locator("td").all_inner_texts()[1:] for row in rows.all()]
            assert cells == [["5.0", "3.20", "2.25 times the mean, in layer 3"], ["", "", ""]]
            assert visit.errors == []
    server.report(recorded("replica-0", 60, time.time()))
    with visiting(browser, server) as visit:
        expect(visit.page.locator(".card")).to_have_count(1)
        expect(visit.page.locator("#experts")).to_be_hidden()
