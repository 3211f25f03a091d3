"""How long to look for bad input that breaks something."""

from __future__ import annotations

import os

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
"""So many times as many cases as in an ordinary run: see ``make test-long``."""
