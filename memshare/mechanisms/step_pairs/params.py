"""What a user can set of the policy ``paper``."""

from __future__ import annotations

from typing import Literal

from memshare.config.fields import PolicyParams


class PaperParams(PolicyParams):
    """Aligned blocks of similar steps, as MemShare describes them (arXiv 2507.21433)."""

    name: Literal["paper"]
    survivor: Literal["oldest", "newest"] = "oldest"
    """Which copy of a pair stays. The paper keeps the ``oldest``."""
