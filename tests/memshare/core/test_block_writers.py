"""Who wrote which block, and what is found of others' (memshare/core/block_writers.py)."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from memshare.core.block_writers import BlockWriters, Found
from memshare.core.interfaces import Admission, BlockGrowth
from memshare.core.token_map import TokenMap

BLOCK = 4
BLOCKS = 12


def admit(
    writers: BlockWriters, request: str, adapter: str | None, blocks: list[int], found: int
) -> list[Found]:
    return writers.take(BlockGrowth([Admission(request, adapter, blocks, BLOCK * found)], []))


def test_one_conversation() -> None:
    writers = BlockWriters(BLOCKS, TokenMap(BLOCK))
    assert admit(writers, "a", "plan", [1, 2], 0) == [Found("plan", 0, 0)]
    assert writers.take(BlockGrowth([], [("a", [3])])) == []
    assert admit(writers, "b", "act", [1, 2, 3, 4], 3) == [Found("act", 12, 12)]
    assert admit(writers, "c", "plan", [1, 2, 3, 4, 5], 4) == [Found("plan", 16, 4)]
    assert (writers.finish("a"), writers.finish("b"), writers.finish("c")) == (0, 12, 4)
    assert writers.finish("c") == 0, "gone"


def test_the_base_model_is_nobody() -> None:
    """It finds its own blocks alone, and what it writes over is nobody's."""
    writers = BlockWriters(BLOCKS, TokenMap(BLOCK))
    admit(writers, "a", "plan", [1, 2], 0)
    assert admit(writers, "base", None, [2, 3], 0) == []
    assert admit(writers, "again", None, [2, 3, 4], 2) == []
    assert writers.finish("again") == 0
    assert admit(writers, "b", "act", [1, 5], 1) == [Found("act", 4, 4)]


def test_a_resumed_request_is_who_it_was() -> None:
    """And finds once more; one that nobody knows is nobody's."""
    writers = BlockWriters(BLOCKS, TokenMap(BLOCK))
    admit(writers, "a", "plan", [1, 2], 0)
    admit(writers, "b", "act", [1, 2, 3], 2)
    assert admit(writers, "b", None, [1, 4, 5], 1) == [Found("act", 4, 4)]
    assert admit(writers, "c", "plan", [1, 4, 6], 2) == [Found("plan", 8, 4)]
    assert writers.finish("b") == 12
    assert writers.take(BlockGrowth([], [("stranger", [2])])) == []
    assert admit(writers, "d", "reflect", [1, 2], 2) == [Found("reflect", 8, 4)]


adapters = st.sampled_from(["plan", "act", "reflect"])
moves = st.lists(
    st.tuples(adapters, st.integers(0, 2), st.integers(0, 4), st.integers(0, 3), st.booleans()),
    max_size=25,
)


@given(moves)
def test_what_is_found_is_counted_by_who_wrote_it(
    made: list[tuple[str, int, int, int, bool]],
) -> None:
    """Against blocks that carry their writer: requests read the beginning of one of the last
    tables, and write over the blocks that nobody was given for longest."""
    writers = BlockWriters(BLOCKS, TokenMap(BLOCK))
    contents: dict[int, str] = {}
    tables: list[list[int]] = [[]]
    free = list(range(1, BLOCKS))

    def fresh(count: int, kept: list[int], adapter: str) -> list[int]:
        taken = [block for block in free if block not in kept][:count]
        for block in taken:
            free.remove(block)
            free.append(block)
            contents[block] = adapter
        return taken

    for number, (adapter, behind, read, new, grows) in enumerate(made):
        found = tables[-1 - min(behind, len(tables) - 1)][:read]
        theirs = sum(contents[block] != adapter for block in found)
        table = [*found, *fresh(new, found, adapter)]
        request = f"r{number}"
        assert admit(writers, request, adapter, table, len(found)) == [
            Found(adapter, BLOCK * len(found), BLOCK * theirs)
        ]
        if grows:
            grown = fresh(1, table, adapter)
            assert writers.take(BlockGrowth([], [(request, grown)])) == []
            table = [*table, *grown]
        tables.append(table)
        assert writers.finish(request) == BLOCK * theirs
