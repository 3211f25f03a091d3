"""Segmentation against a reference that looks at the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from memshare.search.steps import StepSegmenter, compile_delimiters

# A small alphabet, so that tokens and delimiters overlap in every way; "é" is two bytes.
TEXTS = st.text("ab\né", min_size=1, max_size=4)
DELIMITERS = st.lists(TEXTS, min_size=1, max_size=3)
PIECES = st.lists(st.sampled_from([b"a", b"b", b"\n", b"\xc3", b"\xa9"]), max_size=4)
TOKENS = PIECES.map(b"".join)  # may cut a character in two; empty for a special token


@dataclass(frozen=True)
class Case:
    """One request's output and how it is to be cut."""

    delimiters: list[str]
    vocabulary: list[bytes]
    tokens: list[int]
    min_tokens: int
    max_tokens: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    delimiters = draw(DELIMITERS)
    # The bytes themselves are there, so every delimiter can be written.
    vocabulary = [*draw(st.permutations([b"a", b"b", b"\n", b"\xc3", b"\xa9"]))]
    vocabulary += draw(st.lists(TOKENS, max_size=6))
    tokens = draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=60))
    least = draw(st.integers(1, 6))
    return Case(delimiters, vocabulary, tokens, least, draw(st.integers(least, 12)))


def reference(case: Case) -> list[list[int]]:
    """Cut by searching the bytes since the last delimiter; a token without bytes interrupts."""
    delimiters = [d.encode() for d in case.delimiters]
    steps: list[list[int]] = [[]]
    tail = b""
    for token in case.tokens:
        steps[-1].append(token)
        text = case.vocabulary[token]
        tail = tail + text if text else b""
        complete = any(d in tail for d in delimiters)
        if complete:
            tail = b""
        if (complete and len(steps[-1]) >= case.min_tokens) or len(steps[-1]) >= case.max_tokens:
            steps.append([])
    return steps[:-1]  # the last one is still open


def segment(case: Case, chunks: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Feed chunk by chunk; returns the steps and all finished tokens in a row."""
    automaton = compile_delimiters(case.delimiters, case.vocabulary)
    segmenter = StepSegmenter(automaton, case.min_tokens, case.max_tokens)
    steps: list[list[int]] = []
    row: list[int] = []
    for chunk in chunks:
        ids, bounds = segmenter.feed(chunk)
        assert bounds[0] == 0
        assert bounds[-1] == len(ids), "nothing lies outside the steps"
        assert list(bounds) == sorted(set(bounds)), "no step is empty"
        steps += [ids[a:b] for a, b in pairwise(bounds)]
        row += ids
    return steps, row


@given(cases())
@example(Case(["aab"], [b"aa", b"b"], [0, 0, 1, 0, 1], 1, 9))  # a prefix that is a suffix
@example(Case(["aba", "b"], [b"a", b"b"], [0, 1, 0, 1], 1, 9))  # one delimiter inside another
@example(Case(["\n\n"], [b"a\n", b"\nb", b"x"], [2, 0, 1, 2, 0, 1], 1, 9))  # across two tokens
@example(Case(["\n\n"], [b"\n", b"a"], [0, 0, 0, 0, 0, 0], 2, 3))
@example(Case(["\n\n"], [b"\n"], [0, 0, 0, 0, 0], 1, 9))  # what closed one begins no other
@example(Case(["\n\n"], [b"\n", b""], [0, 1, 0, 0], 1, 9))  # a special token interrupts
@example(Case(["ab"], [b"a", b"b"], [0, 0, 1, 0, 1], 1, 2))  # a delimiter across a forced cut
def test_agrees_with_the_bytes(case: Case) -> None:
    assert segment(case, [case.tokens])[0] == reference(case)


@given(cases(), st.data())
def test_chunks_do_not_matter_and_no_token_is_lost_or_repeated(
    case: Case, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(case.tokens)), max_size=8)))
    edges = [0, *cuts, len(case.tokens)]
    chunks = [case.tokens[a:b] for a, b in pairwise(edges)]
    whole, _ = segment(case, [case.tokens])
    steps, row = segment(case, chunks)
    assert steps == whole
    assert segment(case, [[t] for t in case.tokens])[0] == whole
    assert row == case.tokens[: len(row)]
    assert len(case.tokens) - len(row) < case.max_tokens, "what is open is bounded"


@given(cases())
def test_lengths_keep_within_the_bounds(case: Case) -> None:
    assert all(
        case.min_tokens <= len(s) <= case.max_tokens for s in segment(case, [case.tokens])[0]
    )


@given(DELIMITERS, st.lists(TOKENS, min_size=1, max_size=4))
def test_a_vocabulary_that_cannot_write_a_delimiter_is_refused(
    delimiters: list[str], vocabulary: list[bytes]
) -> None:
    # Longer than any delimiter can need: a delimiter has at most 8 bytes.
    reachable = {b""}
    for _ in range(8):
        reachable |= {(text + token)[-16:] for text in reachable for token in vocabulary if token}
        assume(len(reachable) < 5000)
    writable = any(d.encode() in text for text in reachable for d in delimiters)
    if writable:
        compile_delimiters(delimiters, vocabulary)
    else:
        with pytest.raises(ValueError, match=r"steps\.delimiters = .*choose delimiters"):
            compile_delimiters(delimiters, vocabulary)


def test_a_state_that_no_token_reaches_does_not_count_as_writable() -> None:
    with pytest.raises(ValueError, match="can write none"):
        compile_delimiters(["ab"], [b"b", b"x"])


def test_an_unfinished_request_gives_nothing() -> None:
    segmenter = StepSegmenter(compile_delimiters(["\n"], [b"\n", b"a"]), 1, 100)
    assert segmenter.feed([]) == ([], (0,))
    assert segmenter.feed([1, 1, 1]) == ([], (0,))
    assert segmenter.feed([0]) == ([1, 1, 1, 0], (0, 4))
    assert segmenter.feed([]) == ([], (0,))
