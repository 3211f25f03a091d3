"""What became of every block that a request had filled, when the request ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast, get_args

if TYPE_CHECKING:
    from memshare.mechanisms.remap.view import TableView

BlockOutcome = Literal[
    "prompt", "recent window", "given up", "in other tables", "last copy", "no similar block",
    "badly covered", "over budget", "not asked for",
]  # fmt: skip
BLOCK_OUTCOMES: tuple[BlockOutcome, ...] = get_args(BlockOutcome)
"""``given up``, or why not: the first reason that holds, in this order."""


def count_outcomes(
    view: TableView, objection: Callable[[int], str | None]
) -> Counter[BlockOutcome]:
    """Count the full blocks of a request by what became of them.

    Args:
        view: the request's blocks.
        objection: why the policy would not give up the block of an index; None if it would.
    """
    return Counter(_outcome(view, index, objection) for index in range(view.full))


def _outcome(view: TableView, index: int, objection: Callable[[int], str | None]) -> BlockOutcome:
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
    if (reason := objection(index)) is not None:
        return cast(BlockOutcome, reason)
    return "not asked for" if view.has_budget else "over budget"
