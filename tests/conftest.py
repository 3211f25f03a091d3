"""Settings of all tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tools.setup_browser import find_chromium, in_ci

# No deadline: on loaded cores a slow example says nothing. `pytest --hypothesis-profile=thorough`
# digs deeper than a run at every change can.
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", quick)
settings.register_profile("thorough", quick, max_examples=500)
settings.load_profile("quick")


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
