"""``memshare agents switches``: who reads what, what follows from a run, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memshare.cli.main import main
from memshare.errors import UserError
from memshare.lab.agents.switches import WRITTEN, growth, switches, switching
from memshare.lab.plots.switches import plot_switches
from tests.memshare.agents.tiny import write_adapter
from tests.memshare.lab.agents.trajectories import rows, write_base, write_rows


def test_each_agent_reads_more_than_the_one_before() -> None:
    found = switching(range(100), ["a", "b", "c"], [10, 50], 4)
    lengths = [[(turn.role, len(turn.prompt)) for turn in turns] for turns in found]
    assert lengths == [[("a", 10), ("b", 14), ("c", 18)], [("a", 50), ("b", 54), ("c", 58)]]
    assert all(turn.prompt == list(range(len(turn.prompt))) for turns in found for turn in turns)
    assert {len(turn.output) for turns in found for turn in turns} == {WRITTEN}
    with pytest.raises(UserError, match="--contexts 97: the records have 100 tokens, of 105"):
        switching(range(100), ["a", "b", "c"], [10, 97], 4)


def run_of(first: float, cached: int) -> dict[str, Any]:
    """A run over two contexts in which each switch finds so many tokens."""
    turns = [
        {"conversation": c, "prompt": length + 4 * n, "cached": cached if n else 0, "first": time}
        for c, length in enumerate((20, 60))
        for n, time in enumerate((length / 10, first * (c + 1), first * (c + 1) + 0.5))
    ]
    return {"turns": turns, "kept": 10, "block_bytes": 100}


def test_figures_of_a_run() -> None:
    short, long = switches(run_of(1.0, 16))
    assert (short.context, short.agents, short.alone) == (20, 3, 2.0)
    assert (short.first, short.spread) == (1.25, (1.0, 1.5))
    assert (long.first, long.spread) == (2.25, (2.0, 2.5))
    assert short.bytes == round(1000 * 40 / 200), "20 + 8 + 12 of the 200 tokens computed"
    assert long.bytes == round(1000 * 160 / 200)
    assert growth({"nonshared": [short, long], "stacked": [short]}) == {"nonshared": 1.8}


def test_a_picture(tmp_path: Path) -> None:
    found = {3: {"nonshared": switches(run_of(1.0, 0)), "stacked": switches(run_of(0.2, 16))}}
    plot_switches(found, tmp_path / "switches.svg")
    drawn = (tmp_path / "switches.svg").read_text()
    assert "stacked, 3 agents" in drawn
    assert "first token at a switch" in drawn


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switches")
    write_base(folder / "base")
    write_rows(folder / "plan.jsonl", rows("plan"))
    write_adapter(folder / "plan", seed=0)
    return folder


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["plan"], "1 agents: give at least two, and an adapter for each (1 are there)"),
        (["plan", "b=plan", "--agents", "2,3"], "3 agents: give at least two"),
        (["plan", "b=plan", "--contexts", "90000"], "--contexts 90000: the records have"),
        (["plan", "b=plan", "--schemes", "all"], "--schemes all: choose of"),
        (["plan", "b=plan", "--plot", "x.pages"], "x.pages: its ending must be one of"),
    ],
)
def test_refusals(
    words: list[str], what: str, home: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before an engine starts."""
    monkeypatch.chdir(home)
    monkeypatch.setattr("memshare.lab.bench.engine_process.call_in_process", None)
    base = ["--base", "base", "--records", "plan.jsonl"]
    assert main(["agents", "switches", *words, *base]) == 1
    assert what in capsys.readouterr().err
