"""Dashboards are whole: panels that don't overlap, variables that exist, both spellings."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest

from tools.kubernetes import promql
from tools.kubernetes.dashboards import ROWS, render
from tools.kubernetes.metrics import Spelling, exported

SPELLINGS: tuple[Spelling, ...] = ("ray", "vllm")


def dashboard(spelling: Spelling) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(render(spelling))
    return read


def panels(spelling: Spelling) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard(spelling)["panels"]
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_panels_have_places_of_their_own(spelling: Spelling) -> None:
    found = panels(spelling)
    assert len({panel["id"] for panel in found}) == len(found)
    for one, other in combinations([panel["gridPos"] for panel in found], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
        assert one["x"] + one["w"] <= 24


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_query_uses_one_spelling_and_known_variables(spelling: Spelling) -> None:
    known = {v["name"] for v in dashboard(spelling)["templating"]["list"]} | {"__rate_interval"}
    for panel in panels(spelling):
        for target in panel.get("targets", []):
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= known
            for vector in promql.selectors(target["expr"]):
                assert vector.name in exported(spelling)
            legend = target["legendFormat"]
            by = re.search(r"by \((\w+)\)", target["expr"])
            if "{{" in legend:
                assert by is not None
                assert legend == f"{{{{{by[1]}}}}}", "the legend names the label that is left"


def test_only_what_plain_vllm_does_not_export_is_missing_there() -> None:
    titles = {panel.title for row in ROWS.values() for panel in row}
    shown = {s: {p["title"] for p in panels(s) if p["type"] != "row"} for s in SPELLINGS}
    assert shown["ray"] == titles
    assert titles - shown["vllm"] == {"Requests at Ray Serve's proxies"}
