"""What a switch of roles takes, by the length of the context and the number of agents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from memshare.errors import UserError
from memshare.lab.agents.turns import Turn

WRITTEN = 4  # tokens of a turn: what counts is the first


@dataclass(frozen=True, slots=True)
class Switch:
    """Under one scheme.

    Attributes:
        context: tokens that the first agent has read.
        agents: that read it.
        alone: seconds of CPU time until the first agent's first token.
        first: the same of the others, which read a few tokens more: the median of them.
        spread: lowest and highest of the others'.
        bytes: of KV that is kept of the conversation after all turns: of all that the engine keeps,
            in proportion to the tokens that it has computed.
    """

    context: int
    agents: int
    alone: float
    first: float
    spread: tuple[float, float]
    bytes: int


def switching(
    text: Sequence[int], roles: Sequence[str], contexts: Sequence[int], new: int
) -> list[list[Turn]]:
    """A conversation of each length, in which each role has one turn.

    Args:
        text: token ids, at least as many as the longest conversation has.
        roles: in the order of their turns.
        contexts: tokens that the first one reads.
        new: tokens that each of the others reads more than the one before.

    Raises:
        UserError: the text is too short.
    """
    needed = max(contexts) + new * (len(roles) - 1)
    if len(text) < needed:
        raise UserError(
            f"--contexts {max(contexts)}: the records have {len(text):,} tokens, of {needed:,}; "
            "give more records, or shorter contexts"
        )
    return [
        [
            Turn(role, list(text[: context + new * number]), [text[0]] * WRITTEN)
            for number, role in enumerate(roles)
        ]
        for context in contexts
    ]


def switches(run: Mapping[str, Any]) -> list[Switch]:
    """What a replay of :func:`switching` has measured, by length.

    Args:
        run: :class:`memshare.lab.agents.replay.SchemeRun`, as JSON holds it.
    """
    by_length: dict[int, list[Mapping[str, Any]]] = {}
    for turn in run["turns"]:
        by_length.setdefault(turn["conversation"], []).append(turn)
    computed = {number: sum(map(_computed, turns)) for number, turns in by_length.items()}
    bytes_of_all = run["kept"] * run["block_bytes"]
    found = []
    for number, (alone, *others) in by_length.items():
        times = [turn["first"] for turn in others]
        share = computed[number] / sum(computed.values())
        found.append(
            Switch(
                context=alone["prompt"],
                agents=1 + len(others),
                alone=alone["first"],
                first=median(times),
                spread=(min(times), max(times)),
                bytes=round(bytes_of_all * share),
            )
        )
    return found


def _computed(turn: Mapping[str, Any]) -> int:
    tokens: int = turn["prompt"] - turn["cached"]
    return tokens


def growth(found: Mapping[str, Sequence[Switch]]) -> dict[str, float]:
    """What the first token at a switch takes in the last context, of what it takes in the first, by
    scheme; nothing where there is one context."""
    return {
        scheme: rows[-1].first / rows[0].first for scheme, rows in found.items() if len(rows) > 1
    }
