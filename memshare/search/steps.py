"""Cut output into reasoning steps, token by token, without decoding text.

Delimiters are strings; output is token ids. :func:`compile_delimiters` runs the delimiters' byte
automaton (Aho-Corasick) over every vocabulary entry once and keeps, per automaton state, only the
tokens that do something. Segmenting is then one dictionary look-up per token, and a delimiter may
begin in one token and end in another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memshare.config import Setup

_CLOSES = -1  # a transition's target that says: a delimiter is complete, start afresh


@dataclass(frozen=True, slots=True)
class DelimiterAutomaton:
    """Compiled delimiters.

    Attributes:
        transitions: per state, token id -> next state, or ``_CLOSES`` when the token completes a
            delimiter. A token that is absent leads to state 0.
    """

    transitions: tuple[dict[int, int], ...]


def compile_delimiters(
    delimiters: Sequence[str], vocabulary: Sequence[bytes]
) -> DelimiterAutomaton:
    """Compile ``delimiters`` against a vocabulary.

    Args:
        delimiters: non-empty strings.
        vocabulary: the bytes that each token id stands for; empty for special tokens.

    Raises:
        ValueError: no token sequence of this vocabulary can ever complete a delimiter.
    """
    goto, closes = _byte_automaton([d.encode() for d in delimiters])
    alphabet = {byte for d in delimiters for byte in d.encode()}
    transitions: list[dict[int, int]] = [{} for _ in goto]
    for token, text in enumerate(vocabulary):
        if alphabet.isdisjoint(text):
            continue
        for state in range(len(goto)):
            target = _feed(goto, closes, state, text)
            if target != 0:
                transitions[state][token] = target
    if not _can_close(transitions):
        raise ValueError(
            f"steps.delimiters = {list(delimiters)!r}: the model's tokenizer can write none of "
            "them; choose delimiters that occur in its output"
        )
    return DelimiterAutomaton(tuple(transitions))


def _byte_automaton(patterns: list[bytes]) -> tuple[list[dict[int, int]], list[bool]]:
    """Aho-Corasick: per state, the full byte -> state map, and whether a pattern ends there."""
    trie: list[dict[int, int]] = [{}]
    closes = [False]
    for pattern in patterns:
        state = 0
        for byte in pattern:
            if byte not in trie[state]:
                trie[state][byte] = len(trie)
                trie.append({})
                closes.append(False)
            state = trie[state][byte]
        closes[state] = True
    goto: list[dict[int, int]] = [dict(moves) for moves in trie]
    fail = [0] * len(trie)
    queue = deque(trie[0].values())
    while queue:
        state = queue.popleft()
        closes[state] = closes[state] or closes[fail[state]]
        goto[state] = {**goto[fail[state]], **trie[state]}
        for byte, child in trie[state].items():
            fail[child] = goto[fail[state]].get(byte, 0)
            queue.append(child)
    return goto, closes


def _can_close(transitions: list[dict[int, int]]) -> bool:
    """Whether tokens lead from state 0 to the end of a delimiter."""
    reached, waiting = {0}, [0]
    while waiting:
        new = set(transitions[waiting.pop()].values()) - reached
        if _CLOSES in new:
            return True
        reached |= new
        waiting.extend(new)
    return False


def _feed(goto: list[dict[int, int]], closes: list[bool], state: int, text: bytes) -> int:
    """State after ``text``; ``_CLOSES`` if a delimiter was completed anywhere in it."""
    for byte in text:
        state = goto[state].get(byte, 0)
        if closes[state]:
            return _CLOSES
    return state


class StepSegmenter:
    """Cuts one request's output into steps as its tokens arrive."""

    __slots__ = (
        "_automaton",
        "_length",
        "_max_tokens",
        "_min_tokens",
        "_open",
        "_starts",
        "_state",
    )

    def __init__(self, automaton: DelimiterAutomaton, min_tokens: int, max_tokens: int) -> None:
        self._automaton = automaton.transitions
        self._starts = frozenset(automaton.transitions[0])
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._state = 0
        self._length = 0
        self._open: list[int] = []

    def feed(self, tokens: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
        """Take the next tokens; return the steps that they finish.

        A token that completes a delimiter is the last of its step, so no token is ever split.

        Returns:
            ``(ids, bounds)``: the ids of all finished steps back to back (they begin where the last
            finished step ended), and ``[S + 1]`` offsets into them. ``([], (0,))`` if none.
        """
        start = self._length
        if self._state == 0 and self._starts.isdisjoint(tokens):
            bounds = self._cut_by_length(len(tokens))
        else:
            bounds = self._cut_by_delimiter(tokens)
        if len(bounds) == 1:
            self._open.extend(tokens)
            return [], (0,)
        cut = bounds[-1] - start
        finished = [*self._open, *tokens[:cut]]
        self._open = list(tokens[cut:])
        return finished, tuple(bounds)

    def _cut_by_length(self, count: int) -> list[int]:
        """Bounds when no delimiter begins in the next ``count`` tokens: the usual, quick case."""
        bounds = [0]
        length = self._length + count
        while length >= self._max_tokens:
            bounds.append(bounds[-1] + self._max_tokens)
            length -= self._max_tokens
        self._length = length
        return bounds

    def _cut_by_delimiter(self, tokens: Sequence[int]) -> list[int]:
        """Bounds, token by token."""
        transitions = self._automaton
        state, length = self._state, self._length
        bounds = [0]
        for token in tokens:
            state = transitions[state].get(token, 0)
            length += 1
            if state == _CLOSES:
                state = 0
                if length < self._min_tokens:
                    continue
            elif length < self._max_tokens:
                continue
            bounds.append(bounds[-1] + length)
            length = 0
        self._state, self._length = state, length
        return bounds


def tokenizer_refusals(setup: Setup) -> Iterator[str]:
    """What a mechanism that cuts output into steps says to an engine without a tokenizer."""
    if setup.engine is not None and not setup.engine.has_tokenizer:
        yield (
            f"skip_tokenizer_init is set; policy {setup.config.policy.name!r} compiles step "
            "delimiters against the tokenizer"
        )
