"""How many pages a request reads. Light: the scheduler asks it, too."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from memshare.config import SelectionConfig

Counts = npt.NDArray[np.int32]


def pages_read(config: SelectionConfig, pages: Counts) -> Counts:
    """How many of its pages each request reads, those that are always read included.

    Args:
        config: with a budget.
        pages: that each request has, ``[rows]``.
    """
    if config.pages is not None:
        wanted = np.full_like(pages, config.pages)
    else:
        assert config.budget is not None, "nothing is selected"
        wanted = np.ceil(pages * config.budget).astype(np.int32)
    always = config.first_pages + config.recent_pages
    read: Counts = np.minimum(np.maximum(wanted, always), pages)
    return read


def chooses(config: SelectionConfig, pages: int) -> bool:
    """Whether a request of so many pages reads fewer."""
    if config.pages is not None:
        return pages > config.pages
    assert config.budget is not None, "nothing is selected"
    wanted = max(math.ceil(pages * config.budget), config.first_pages + config.recent_pages)
    return wanted < pages
