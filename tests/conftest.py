"""Settings of all tests."""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from memshare.process_env import collector_at_rest
from tests.selection import SHARED, may_select, work_unit
from tools.setup_browser import find_chromium, in_ci

# No deadline: on loaded cores a slow example says nothing. `pytest --hypothesis-profile=thorough`
# digs deeper than a run at every change can.
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", quick)
settings.register_profile("thorough", quick, max_examples=500)
settings.load_profile("quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file of which ``-m`` selects nothing: vLLM alone takes 15 s of CPU to load."""
    expression = config.getoption("markexpr")
    if not expression or collection_path.suffix != ".py":
        return None
    source = collection_path.read_text(encoding="utf-8")
    return True if not may_select(expression, source) else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the files, and what they test, without collecting garbage that is none."""
    with collector_at_rest():
        result = yield
    gc.freeze()
    return result


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts no Ray first: it fails sooner. Of the rest, the longest first."""
    items.sort(key=_order)


def _order(item: pytest.Item) -> tuple[bool, bool]:
    return item.get_closest_marker("cluster") is not None, work_unit(item.nodeid) not in SHARED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``: the files of a folder that shares a server stay together, too."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return work_unit(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium. Without one tests are skipped, but fail in continuous integration."""
    path = find_chromium()
    if path is None:
        missing = "no Chromium; see tools/setup_browser.py"
        if in_ci():
            pytest.fail(missing)
        pytest.skip(missing)
    return path
