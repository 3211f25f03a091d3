"""The HTTP reference is what the schema of a replica's app says. vLLM is loaded, not started."""

from __future__ import annotations

import pytest

from tools.make_docs import PAGES

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_the_http_reference_is_up_to_date() -> None:
    page, render = PAGES["http"]
    text = page.read_text(encoding="utf-8")
    assert text == render(), "run: python -m tools.make_docs http"
    assert "| `POST` | `/v1/chat/completions` | every key, within its limits |" in text
