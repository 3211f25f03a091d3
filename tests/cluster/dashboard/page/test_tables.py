"""Tables of the page over all replicas: of adapters that share, of experts that are counted,
and of guards."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from playwright.sync_api import BrowserContext, expect

from cluster.config import PageConfig
from cluster.dashboard.records import AdapterTokens, ExpertUse
from cluster.guard.guard import GuardState
from tests.cluster.dashboard.page.recorded import ARGUMENTS, recorded, visiting
from tests.cluster.dashboard.page.serving import PageServer, serve_page

pytestmark = pytest.mark.browser


def test_adapters_that_share_have_a_table(browser: BrowserContext, server: PageServer) -> None:
    """What they have found on all replicas; no table where none share."""
    adapters = {"plan": "/adapters/plan", "act": "/adapters/act"}
    agents = {"scheme": "stacked", "adapters": adapters}
    shares = ARGUMENTS | {"memshare": {"mode": "off", "agents": agents}}
    found = {"plan": AdapterTokens(96, 0), "act": AdapterTokens(2000, 1500)}
    with serve_page(PageConfig(), shares) as sharing:
        for name in ("replica-0", "replica-1"):
            report = recorded(name, 60, time.time())
            sharing.report(replace(report, adapters=found if name == "replica-0" else {}))
        with visiting(browser, sharing) as visit:
            rows = visit.page.locator("#agents tbody tr")
            expect(rows).to_have_count(2)
            cells = [row.locator("td").all_inner_texts() for row in rows.all()]
            assert cells == [["plan", "96", "0", "0%"], ["act", "2,000", "1,500", "75%"]]
            # Of each column of numbers: where its header and its numbers end.
            ends = visit.page.locator("#agents .number").evaluate_all(
                """cells => cells.map((cell) => Math.round(cell.getBoundingClientRect().right
                  - parseFloat(getComputedStyle(cell).paddingRight)))"""
            )
            assert ends == ends[:3] * 3
            assert len(set(ends)) == 3
            expect(visit.page.locator("#agents-hint")).to_contain_text("scheme stacked")
            expect(visit.page.locator("#settings")).to_contain_text("agents stacked")
            assert visit.errors == []
    server.report(recorded("replica-0", 60, time.time()))
    with visiting(browser, server) as visit:
        expect(visit.page.locator(".card")).to_have_count(1)
        expect(visit.page.locator("#agents")).to_be_hidden()


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


def test_a_guard_has_a_table_and_a_button_that_ends_a_stop(
    browser: BrowserContext, server: PageServer
) -> None:
    guarded = ARGUMENTS | {"guard": {"bound": 0.05}}
    states = {
        "replica-0": GuardState(0.012, 0.004, 0.031, 180, 0, False),
        "replica-1": GuardState(0.31, 0.2, 0.42, 9, 1, True),
        "replica-2": GuardState(0.0, 0.0, 1.0, 0, 0, False),
    }

    def tell(serving: PageServer) -> None:
        for name, state in states.items():
            serving.report(replace(recorded(name, 60, time.time()), guard=state))

    with serve_page(PageConfig(), guarded) as guarding:
        tell(guarding)
        with visiting(browser, guarding) as visit:
            rows = visit.page.locator("#guard tbody tr")
            expect(rows).to_have_count(3)
            cells = {tuple(row.locator("td").all_inner_texts()[1:5]) for row in rows.all()}
            assert cells == {
                ("1.2%", "0.4% to 3.1%", "180", "0"),
                ("31.0%", "20.0% to 42.0%", "9", "1"),
                ("unknown", "0.0% to 100.0%", "0", "0"),
            }
            expect(visit.page.locator("#guard-hint")).to_contain_text("Bound 5.0%")
            button = visit.page.get_by_role("button", name="Let it go on")
            expect(button).to_have_count(1)
            with visit.page.expect_response("**/api/guard?*") as answered:
                button.click()
            assert answered.value.status == 202
            tell(guarding)
            assert guarding.went_on == ["replica-1"]
            assert visit.errors == []
    server.report(recorded("replica-0", 60, time.time()))
    with visiting(browser, server) as visit:
        expect(visit.page.locator(".card")).to_have_count(1)
        expect(visit.page.locator("#guard")).to_be_hidden()
