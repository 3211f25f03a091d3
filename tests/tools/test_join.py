"""Records that were made in pieces are one comparison (tools/bench/join.py)."""

from __future__ import annotations

import pytest

from memshare.errors import UserError
from memshare.lab.bench.records import BenchRecord
from tests.memshare.lab.test_plots import a_run
from tools.bench.join import counts_table, join


def piece(arm: str, prompts: list[int], right: list[bool], preemptions: int) -> BenchRecord:
    run = a_run(arm, 1.0, right, preemptions=preemptions)
    return BenchRecord(32, 256, 2048, prompts, {arm: None}, [[run]])


def test_pieces_by_arm_and_by_request_add_up() -> None:
    pieces = [
        piece("dense", [10, 11], [True, True], 4),
        piece("dense", [12, 13], [True, False], 6),
        piece("twins", [10, 11], [False, True], 1),
        piece("twins", [12, 13], [True, False], 1),
    ]
    dense, twins = join(pieces)
    assert [outcome.right for outcome in dense.outcomes] == [True, True, True, False]
    assert [outcome.right for outcome in twins.outcomes] == [False, True, True, False]
    assert (dense.preemptions, twins.preemptions, dense.tokens) == (10, 2, 2000)
    assert "| twins | 10 | 200.0 (1.00x) | 2 (0.20x) | 100 (1.00x) |" in counts_table(
        [dense, twins]
    )
    with pytest.raises(UserError, match=r"one piece has the arms dense, twins, another dense;"):
        join(pieces[:-1])
    with pytest.raises(UserError, match="two records have the arm 'dense'"):
        join([pieces[0], pieces[0]])
