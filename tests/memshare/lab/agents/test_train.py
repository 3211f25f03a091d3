"""``memshare agents train``: adapters that share, the same after an interruption, and refusals."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memshare.agents.adapter import WEIGHTS, read_adapter
from memshare.agents.refusals import faults_of
from memshare.cli.main import main
from memshare.config import AgentsConfig
from memshare.lab.agents import fit as fitting
from memshare.lab.agents import train as training
from memshare.lab.agents.card import RoleCard
from tests.memshare.lab.agents.trajectories import ROLES, rows, write_base, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and a file of records for each role."""
    folder = tmp_path_factory.mktemp("training")
    write_base(folder / "base")
    for role in ROLES:
        write_rows(folder / f"{role}.jsonl", rows(role))
    return folder


def train(home: Path, output: Path, *more: str, steps: int = 40) -> int:
    return main([
        "agents", "train", *(f"{role}={home / role}.jsonl" for role in ROLES),
        "--base", str(home / "base"), "--output", str(output), "--rank", "4", "--batch", "1",
        "--steps", str(steps), "--rate", "0.01", "--held-out", "0.34", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    assert train(home, home / "trained", "--licences", "none") == 0
    return home / "trained"


def faults(folder: Path, scheme: Any) -> list[str]:
    folders = {role: folder / role for role in ROLES}
    adapters = [read_adapter(role, path) for role, path in folders.items()]
    return list(faults_of(adapters, AgentsConfig(scheme=scheme, adapters=folders)))


def test_roles_share_a_cache(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert faults(trained, "base_lr_shared") == faults(trained, "stacked") == []
    plan, act = (read_adapter(role, trained / role) for role in ROLES)
    assert plan.digest != act.digest
    assert {module.part for module in act.modules} == {"q_proj", "v_proj"}
    assert main(["agents", "check", str(trained / "plan"), str(trained / "act")]) == 0
    assert "plan, act share one cache, with 8 low-rank columns" in capsys.readouterr().out
    assert not (trained / ".work").exists()


def test_roles_learn_and_their_cards_say_so(trained: Path) -> None:
    for role, taken_from in zip(ROLES, (None, "plan"), strict=True):
        card = RoleCard.read(trained / role / "README.md")
        assert (card.role, card.taken_from, card.licences) == (role, taken_from, "none")
        assert card.trajectories == (4, 2)
        assert card.records == (8, 4)
        assert card.nll_before is not None
        assert card.nll_after is not None
        assert card.nll_after < 0.8 * card.nll_before
        assert card.base == "base"
        assert len(card.curve) == 10
        assert card.curve[-1] < 0.8 * card.curve[0]
        assert RoleCard.read(trained / role / "README.md").markdown() == (
            trained / role / "README.md"
        ).read_text("utf-8")


def test_peft_loads_them_as_they_were_measured(home: Path, trained: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memshare.lab.agents.passes import make_passes
    from memshare.lab.agents.records import read_records, split

    records = {role: read_records(home / f"{role}.jsonl") for role in ROLES}
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    unseen = make_passes(split(records, 0.34).held_out["act"], tokenizer, 1024)
    for role, is_it in (("act", True), ("plan", False)):
        model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
        found = fitting.mean_nll(PeftModel.from_pretrained(model, trained / role), unseen, "")
        wanted = RoleCard.read(trained / "act" / "README.md").nll_after
        assert (found == pytest.approx(wanted, abs=0.01)) is is_it


def test_an_ended_run_goes_on(
    home: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice ended, in either role, it makes the same adapters, byte by byte."""
    whole, calls = fitting._step, 0

    def ended(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls in (10, 60):
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(fitting, "_step", ended)
    output = tmp_path / "again"
    assert [train(home, output, "--licences", "none") for _ in range(3)] == [130, 130, 0]
    assert calls == 80 + 2 + 2, "one step since the last that was saved, each time"
    for role in ROLES:
        for name in (WEIGHTS, "adapter_config.json", "README.md"):
            assert (output / role / name).read_bytes() == (trained / role / name).read_bytes()


def test_an_output_folder_is_used_once(
    home: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("memshare.lab.agents.train._load_base", None)  # nothing loads
    for output, more, what in (
        (trained, [], "is complete; name a new folder"),
        (trained, ["--rate", "0.02"], "was begun with another rate; finish it"),
        (trained, ["--separate", "--seed", "3"], "was begun with another seed, shared;"),
        (home, [], "exists; name a new folder"),
        (home / "plan.jsonl", [], "exists; name a new folder"),
    ):
        assert train(home, output, *more) == 1
        assert what in capsys.readouterr().err


def test_separate_matrices(home: Path, tmp_path: Path) -> None:
    assert train(home, tmp_path / "apart", "--separate", "--held-out", "0", steps=2) == 0
    (fault,) = faults(tmp_path / "apart", "base_lr_shared")
    assert "act: its A matrix on v_proj differs" in fault
    assert faults(tmp_path / "apart", "stacked") == []
    card = RoleCard.read(tmp_path / "apart" / "act" / "README.md")
    assert (card.taken_from, card.nll_before, card.change) == (None, None, "was not measured")


def test_queries_alone(home: Path, tmp_path: Path) -> None:
    assert train(home, tmp_path / "queries", "--targets", "q_proj", steps=1) == 0
    adapter = read_adapter("act", tmp_path / "queries" / "act")
    assert {module.part for module in adapter.modules} == {"q_proj"}


@pytest.mark.parametrize("first", [1, 0])
def test_layers_below_are_read_once(
    first: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but time changes by it; with another layer's input the adapters are others."""
    more = ("--first-layer", "1")
    assert train(home, tmp_path / "quick", *more, steps=4) == 0
    layers = {module.layer for module in read_adapter("act", tmp_path / "quick" / "act").modules}
    assert layers == {1}
    if first == 1:  # as slowly as it goes: all layers in every step
        monkeypatch.setattr(training, "_texts", lambda *args: [(one, None) for one in args[-1]])
        monkeypatch.setattr(training, "layers_from", lambda *_: contextlib.nullcontext())
    else:
        below = training.states_below
        monkeypatch.setattr(
            training, "states_below", lambda base, seen, _, *rest: below(base, seen, first, *rest)
        )
    assert train(home, tmp_path / "other", *more, steps=4) == 0
    for role in ROLES:
        quick, other = (load_file(tmp_path / name / role / WEIGHTS) for name in ("quick", "other"))
        same = all(torch.allclose(quick[name], other[name], atol=1e-3) for name in quick)
        assert same is (first == 1)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["plan=FILE", "--first-layer", "2"], "--first-layer 2: "),
        (["plan"], "give ROLE=FILE"),
        (["../x=FILE"], "give ROLE=FILE"),
        (["plan=/nowhere.jsonl"], "there is no file /nowhere.jsonl"),
        (["plan=FILE", "plan=FILE"], "the role 'plan' is there already"),
        (["plan=FILE", "--rank", "65"], "--rank 65: adapters that share have at most 64"),
        (["plan=FILE", "--targets", "q_proj,k_proj"], "--targets k_proj: adapters that share"),
        (["plan=FILE", "--base", "HOME"], "give the folder of the base model"),
        (["plan=FILE", "--base", "/nowhere/base"], "--base /nowhere/base"),
        (["plan=BAD"], "line 3: output is empty"),
        (["plan=FILE", "--held-out", "1"], "too few trajectories to keep 1 of all 6 aside"),
    ],
)
def test_refusals(
    words: list[str], what: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before anything loads, and before the output folder is made."""
    monkeypatch.setattr("memshare.lab.agents.train._load_base", None)
    bad = write_rows(tmp_path / "bad.jsonl", [*rows("plan")[:2], {"input": "a", "output": ""}])
    places = {"FILE": home / "plan.jsonl", "BAD": bad, "HOME": tmp_path}
    spelled = [
        functools.reduce(lambda text, name: text.replace(name, str(places[name])), places, word)
        for word in words
    ]
    base = [] if "--base" in words else ["--base", str(home / "base")]
    output = tmp_path / "made"
    assert main(["agents", "train", *spelled, *base, "--output", str(output)]) == 1
    assert what in capsys.readouterr().err
    assert not output.exists()


def test_peft_is_an_extra(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memshare.extras.find_spec", lambda name: None)
    assert train(home, tmp_path / "made") == 1
    assert "needs peft, which is not installed: pip install 'memshare[train]'" in (
        capsys.readouterr().err
    )


def test_a_card_of_something_else(tmp_path: Path) -> None:
    from memshare.errors import UserError

    for text in ("", "---\nbase: x\n---\n", "---\nmemshare: {}\n---\n"):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(UserError, match="is not a card of an adapter"):
            RoleCard.read(tmp_path / "README.md")
