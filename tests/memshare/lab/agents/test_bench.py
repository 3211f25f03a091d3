"""``memshare agents bench``: conversations out of trajectories, figures, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from memshare.cli.main import main
from memshare.errors import UserError
from memshare.lab.agents.quality import qualities, read_sums
from memshare.lab.agents.records import Record
from memshare.lab.agents.replay import distributions
from memshare.lab.agents.turns import ReplayPlan, Turn, conversations
from tests.memshare.agents.tiny import write_adapter
from tests.memshare.lab.agents.trajectories import ROLES, rows, write_base, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, records, and adapters: of each role, and one that shares nothing."""
    folder = tmp_path_factory.mktemp("bench")
    write_base(folder / "base")
    for number, role in enumerate(ROLES):
        write_rows(folder / f"{role}.jsonl", rows(role))
        write_adapter(folder / role, seed=number, a_seed=9)
    write_adapter(folder / "keys", seed=7, targets=["q_proj", "k_proj"])
    return folder


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> Any:
    return AutoTokenizer.from_pretrained(home / "base")


def records(*roles: str) -> dict[str, list[Record]]:
    return {role: [Record(**row) for row in rows(role)] for role in roles}


def test_turns_follow_the_growing_context(tokenizer: Any) -> None:
    found = conversations(records(*ROLES), tokenizer, 4)
    assert len(found) == 4
    for turns in found:
        assert sorted(turn.role for turn in turns) == ["act", "act", "plan", "plan"]
        lengths = [len(turn.prompt) for turn in turns]
        assert lengths == sorted(lengths)
        assert all(turn.output[-1] == tokenizer.eos_token_id for turn in turns)
        root = turns[0].prompt
        assert all(turn.prompt[: len(root)] == root for turn in turns)


def test_a_history_is_of_other_trajectories(tokenizer: Any) -> None:
    plain = conversations(records(*ROLES), tokenizer, 3)
    for before, turns in zip(plain, conversations(records(*ROLES), tokenizer, 3, 50), strict=True):
        first = turns[0].prompt[:50]
        for old, new in zip(before, turns, strict=True):
            assert new.prompt == [*first, *old.prompt]
        assert before[0].prompt[:30] != first[:30]
    with pytest.raises(UserError, match="--history 100000: the other trajectories have fewer"):
        conversations(records(*ROLES), tokenizer, 3, 100_000)


def test_one_role_does_not_switch(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no trajectory has turns of two roles"):
        conversations(records("plan"), tokenizer, 4)


def test_figures_of_quality(tmp_path: Path) -> None:
    """Two conversations of which one is four times as long; figures are per token."""
    lengths = (2, 8)
    talks = [[Turn("plan", [0], [1] * n), Turn("act", [0], [2] * n)] for n in lengths]
    plan = ReplayPlan("m", "float32", {}, talks, 1, None, 32, 64, True, str(tmp_path))
    exact = np.log(np.array([0.125, 0.25, 0.5, 0.125], np.float16))
    for conversation, length in enumerate(lengths):
        for turn in (0, 1):
            exact_file = distributions(str(tmp_path), conversation, turn, "nonshared")
            np.tile(exact, (length, 1)).astype(np.float16).tofile(exact_file)
            for scheme, lost in (("stacked", 0.1), ("full_shared", 0.4 + 0.2 * conversation)):
                row = np.array([lost, lost * turn, 1 - lost], np.float32)
                file = distributions(str(tmp_path), conversation, turn, scheme)
                np.tile(row, (length, 1)).tofile(file)
    schemes = ("nonshared", "stacked", "full_shared")
    found = qualities(read_sums(plan, schemes, "act"))
    assert found["nonshared"].nll.value == pytest.approx(np.log(2), abs=1e-3)
    assert found["stacked"].nll.value == pytest.approx(np.log(2) + 0.1, abs=1e-3)
    assert found["full_shared"].kl.value == pytest.approx(0.2 * 0.4 + 0.8 * 0.6, abs=1e-3)
    kept = found["stacked"].kept_nll
    assert kept is not None
    assert kept.value == pytest.approx(1 - 0.1 / 0.56, abs=1e-3)
    assert (kept.low, kept.high) == pytest.approx((1 - 0.1 / 0.4, 1 - 0.1 / 0.6), abs=1e-3)
    both = qualities(read_sums(plan, schemes))
    assert both["stacked"].nll.value == pytest.approx((np.log(4) + np.log(2) + 0.1) / 2, abs=1e-3)
    alone = qualities(read_sums(plan, schemes[:2]))
    assert alone["stacked"].kept_nll is None


@pytest.mark.parametrize(
    ("adapters", "more", "what"),
    [
        (["plan", "act"], ["--schemes", "shared"], "--schemes shared: choose of nonshared,"),
        (["plan", "keys"], [], "keys: it changes k_proj"),
        (["plan", "nowhere"], [], "there is no such folder"),
        (["plan"], [], "give one file for each adapter, by its role; not so: act"),
        (["plan", "act"], ["--held-out", "0"], "no trajectory has turns of two roles"),
        (["plan", "act"], ["--base", "/nowhere/base"], "--base /nowhere/base: its tokenizer"),
        (["plan", "act"], ["--history", "9999", "--held-out", "1"], "--history 9999: the other"),
    ],
)
def test_refusals(
    adapters: list[str], more: list[str], what: str, home: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("memshare.lab.bench.engine_process.call_in_process", None)  # no engine
    files = [f"--records={role}={home / role}.jsonl" for role in ROLES]
    folders = [str(home / name) for name in adapters]
    assert main(["agents", "bench", *folders, *files, f"--base={home / 'base'}", *more]) == 1
    assert what in capsys.readouterr().err
