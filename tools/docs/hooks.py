"""Hooks of mkdocs (``mkdocs.yml``)."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|data):<code>~?(?:[\w.]+\.)?(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings refer to other code by roles of Sphinx; a page shows the name alone."""
    return _ROLE.sub(r"<code>\1</code>", html)
