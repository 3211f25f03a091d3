"""Trajectories as conversations that roles take turns in, in token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memshare.errors import UserError
from memshare.lab.agents.records import Record, tokens_of, trajectories

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role reads and writes.

    Attributes:
        role: whose adapter does.
        prompt: token ids.
        output: token ids that it is made to write.
    """

    role: str
    prompt: list[int]
    output: list[int]


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What is replayed, and on what memory.

    Attributes:
        model: folder or hub id of the base model.
        dtype: of weights and cache.
        adapters: folders by role.
        conversations: turns, each conversation's one after the other.
        at_once: conversations that are open at a time.
        kv_tokens: KV memory, in tokens of the base model's cache; None for as much as is used.
        block_size: tokens.
        step_tokens: of an engine step, at most.
        measured: whether distributions are compared with those of ``nonshared``, which has to run
            first, and keeps them.
        folder: where distributions and measurements are kept.
    """

    model: str
    dtype: str
    adapters: dict[str, str]
    conversations: list[list[Turn]]
    at_once: int
    kv_tokens: int | None
    block_size: int
    step_tokens: int
    measured: bool
    folder: str

    @property
    def longest(self) -> int:
        """Tokens of the longest turn."""
        return max(len(t.prompt) + len(t.output) for turns in self.conversations for t in turns)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and outputs, those that turns have in common included."""
        return sum(len(t.prompt) + len(t.output) for turns in self.conversations for t in turns)

    @property
    def written(self) -> int:
        """Tokens of all outputs."""
        return sum(len(turn.output) for turns in self.conversations for turn in turns)

    def save(self, path: Path) -> None:
        """Write it for another process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> ReplayPlan:
        """Read what :meth:`save` wrote."""
        held = json.loads(path.read_text())
        talks = [[Turn(**turn) for turn in turns] for turns in held.pop("conversations")]
        return cls(**held, conversations=talks)


def conversations(
    records: Mapping[str, Sequence[Record]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    history: int = 0,
) -> list[list[Turn]]:
    """Make a conversation of each trajectory: its turns in the order in which its context grew.

    Args:
        records: by role.
        tokenizer: of the base model.
        limit: conversations, at most; those come first in which most roles take part.
        history: tokens of other trajectories that are put in front of each, for longer contexts.

    Raises:
        UserError: no trajectory has turns of two roles, or there is too little text for a history.
    """
    every = [(role, record) for role, of_role in records.items() for record in of_role]
    roots = trajectories([record for _, record in every])
    by_root: dict[str, list[tuple[str, Record]]] = {}
    for root, (role, record) in zip(roots, every, strict=True):
        by_root.setdefault(root, []).append((role, record))
    mixed = [found for found in by_root.values() if len({role for role, _ in found}) > 1]
    mixed.sort(key=lambda found: -len({role for role, _ in found}))  # stable
    if not mixed:
        raise UserError("no trajectory has turns of two roles; give records of the same ones")
    before = _history(mixed, tokenizer, history)
    return [
        [
            _turn(role, record, before[number], tokenizer)
            for role, record in sorted(found, key=lambda one: len(one[1].input))
        ]
        for number, found in enumerate(mixed[:limit])
    ]


def _turn(
    role: str, record: Record, before: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Turn:
    prompt, output = tokens_of(record, tokenizer)
    return Turn(role, [*before, *prompt], output)


def _history(
    found: Sequence[Sequence[tuple[str, Record]]],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
) -> list[list[int]]:
    """For each trajectory, so many tokens of the ones that follow it, around the end."""
    texts = [
        tokenizer.encode(max((r.input for _, r in turns), key=len), add_special_tokens=False)
        for turns in found
    ]
    if tokens > sum(map(len, texts)) - max(map(len, texts)):
        raise UserError(f"--history {tokens}: the other trajectories have fewer tokens; give less")
    histories = []
    for number in range(len(texts)):
        others = [token for text in (*texts[number + 1 :], *texts[:number]) for token in text]
        histories.append(others[:tokens])
    return histories


def texts_of(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of all trajectories' longest inputs, one behind the other."""
    longest: dict[str, str] = {}
    for root, record in zip(trajectories(records), records, strict=True):
        longest[root] = max(longest.get(root, ""), record.input, key=len)
    return [
        token
        for text in longest.values()
        for token in tokenizer.encode(text, add_special_tokens=False)
    ]
