"""What a model reads at a time: a record, and all records that it goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memshare.lab.agents.records import Record, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Pass:
    """A text, and what is to be predicted in it.

    Attributes:
        tokens: that the model reads.
        positions: of the tokens that something is predicted behind.
        targets: the tokens to predict there, outputs of records with their ends.
        records: how many records they are of.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    records: int


@dataclass(frozen=True, slots=True)
class _Turn:
    """A record's tokens.

    Attributes:
        read: input and output.
        start: tokens of the input.
        targets: the output and its end.
    """

    read: tuple[int, ...]
    start: int
    targets: tuple[int, ...]


def make_passes(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, context: int
) -> list[Pass]:
    """Make passes of all records.

    A causal model that reads a record's text reads that of every record that this one goes on from,
    so they are predicted in one pass: the same gradient as from passes of their own, for less.

    Args:
        records: of one role.
        tokenizer: of the model.
        context: tokens that are read in front of a pass's last output, at most; earlier ones are
            cut off. A record that would lose more than half of what it may have so gets a pass of
            its own.
    """
    turns = sorted((_turn(record, tokenizer) for record in records), key=lambda turn: turn.read)
    groups: list[list[_Turn]] = []
    for turn in reversed(turns):  # what goes on from one is before it
        if groups and _belongs(turn, groups[-1][0], context):
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return [_pass(group, context) for group in reversed(groups)]


def _turn(record: Record, tokenizer: PreTrainedTokenizerBase) -> _Turn:
    before, targets = tokens_of(record, tokenizer)
    # Behind the last target nothing is predicted.
    return _Turn((*before, *targets[:-1]), len(before), tuple(targets))


def _belongs(turn: _Turn, last: _Turn, context: int) -> bool:
    left = turn.start - max(0, last.start - context)
    return last.read[: len(turn.read)] == turn.read and left >= min(turn.start, context // 2)


def _pass(group: Sequence[_Turn], context: int) -> Pass:
    last = group[0]
    cut = max(0, last.start - context)
    places = [
        (turn.start - cut - 1 + i, target)
        for turn in reversed(group)
        for i, target in enumerate(turn.targets)
    ]
    positions, targets = zip(*places, strict=True)
    return Pass(last.read[cut:], positions, targets, len(group))
