"""Where MemShare keeps what it has made for one user: prepared models, trained probes."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder, in the user's cache; it may not be there yet."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "memshare"
