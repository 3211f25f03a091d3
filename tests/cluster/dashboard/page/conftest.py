"""A browser, and a page without an engine behind it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext

from cluster.config import PageConfig
from tests.cluster.dashboard.page.browsing import open_browser
from tests.cluster.dashboard.page.recorded import ARGUMENTS
from tests.cluster.dashboard.page.serving import PageServer, serve_page


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[BrowserContext]:
    with open_browser(chromium) as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[PageServer]:
    with serve_page(PageConfig(), ARGUMENTS) as server:
        yield server
