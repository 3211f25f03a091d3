"""A real browser for tests and figures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import BrowserContext, sync_playwright

# Nothing of the browser's own may use the network, or the sandbox that containers don't allow.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--font-render-hinting=none",
)  # fmt: skip


@contextmanager
def open_browser(
    chromium: str, width: int = 1280, height: int = 900, scale: float = 1.0
) -> Iterator[BrowserContext]:
    """A headless Chromium with an empty profile, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="memshare-browser-") as profile, sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            headless=True,
            args=list(FLAGS),
            chromium_sandbox=False,
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
        )
        try:
            yield context
        finally:
            context.close()
