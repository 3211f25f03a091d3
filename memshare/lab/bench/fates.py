"""What became of every block that a request had filled, when the request ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from memshare.config import MemShareConfig, PaperParams, TwinsParams

if TYPE_CHECKING:
    from memshare.core.reclaimer import TableView

Fate = Literal[
    "prompt", "recent window", "given up", "in other tables", "last copy", "no similar block",
    "badly covered", "over budget", "not asked for",
]  # fmt: skip
FATES: tuple[Fate, ...] = get_args(Fate)
"""``given up``, or why not: the first reason that holds, in this order."""


def fates(
    view: TableView, config: MemShareConfig, has_pair: Callable[[int], bool]
) -> Counter[Fate]:
    """Count the full blocks of a request by their fate.

    Args:
        view: the request's blocks.
        config: MemShare's configuration.
        has_pair: whether a verified pair, of a staged policy, waits for the block of that index.
    """
    return Counter(_fate(view, index, config, has_pair) for index in range(view.full))


def _fate(
    view: TableView, index: int, config: MemShareConfig, has_pair: Callable[[int], bool]
) -> Fate:
    policy = config.policy
    if index < view.first:
        return "prompt"
    if not view.is_own(index):
        return "given up"
    if index >= view.end:
        return "recent window"
    if not view.is_alone(index):
        return "in other tables"
    if not view.is_target(index):
        return "last copy"
    if isinstance(policy, PaperParams) and not has_pair(index):
        return "no similar block"
    if isinstance(policy, TwinsParams) and view.coverage[index] < policy.min_coverage:
        return "badly covered"
    return "not asked for" if view.has_budget else "over budget"
