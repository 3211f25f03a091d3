"""Positions, entries and slots (memshare/core/token_map.py), against written-out tables."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memshare.core.token_map import TokenMap

SIZES = st.integers(1, 64)


def written_out(size: int, tokens: int) -> list[list[int]]:
    """The block table of the first ``tokens`` tokens: the positions under each entry."""
    table: list[list[int]] = []
    for position in range(tokens):
        if not table or len(table[-1]) == size:
            table.append([])
        table[-1].append(position)
    return table


@given(SIZES, st.integers(0, 300))
def test_every_token_is_where_a_table_written_token_by_token_has_it(size: int, tokens: int) -> None:
    places, table = TokenMap(size), written_out(size, tokens)
    for entry, positions in enumerate(table):
        assert places.first_position(entry) == positions[0]
        assert list(range(tokens)[places.positions(entry)]) == positions
        for slot, position in enumerate(positions):
            assert (places.entry(position), places.slot(position)) == (entry, slot)
    assert places.entries(tokens) == len(table)
    assert places.full(tokens) == sum(len(positions) == size for positions in table)
    full, left = places.full_and_left(tokens)
    assert full == places.full(tokens)
    after = written_out(size, tokens + left)
    assert places.full(tokens) + 1 == len(after)
    assert len(after[-1]) == size


@given(SIZES, st.integers(0, 200), st.integers(1, 100))
def test_touched_entries_are_those_that_hold_one_of_the_tokens(
    size: int, start: int, count: int
) -> None:
    table = written_out(size, start + count)
    expected = [entry for entry, positions in enumerate(table) if positions[-1] >= start]
    assert list(TokenMap(size).touched(start, start + count)) == expected


@given(SIZES, st.lists(st.integers(0, 5000), max_size=50))
def test_arrays_are_mapped_as_their_numbers_are(size: int, positions: list[int]) -> None:
    places = TokenMap(size)
    for dtype in (np.int32, np.int64):
        array = np.array(positions, dtype)
        assert places.entry(array).tolist() == [places.entry(p) for p in positions]
        assert places.slot(array).tolist() == [places.slot(p) for p in positions]
        assert places.entry(array).dtype == places.first_position(array).dtype == dtype
