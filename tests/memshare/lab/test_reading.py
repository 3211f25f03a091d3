"""Reading texts without an engine: a tiny Llama with random weights, of byte tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from memshare.cli import replay
from memshare.cli.main import main
from memshare.config import DistanceConfig, load_config
from memshare.lab.plots.steps import kv
from memshare.lab.plots.trace import marks
from memshare.lab.replay.divergence import COLUMNS
from memshare.lab.replay.fp8 import to_fp8
from memshare.lab.replay.prefilled import PrefilledTrace, Reader
from memshare.mechanisms.baselines.params import OldestParams
from memshare.mechanisms.step_pairs.params import PaperParams
from memshare.mechanisms.twins.params import TwinsParams
from tools.bench import study_policies

SIZE = 32
STEP = "So the sum of both is 42, and I check it.\n\n"
TEXT = "".join(f"{STEP}Line {i}: " + "abcdefghijklmnopqrstuvwxyz"[i:] * 2 for i in range(12))
PROMPT = "Add the numbers, and write every step as a paragraph of its own."
DAMAGE = {name: i for i, name in enumerate(COLUMNS)}


@pytest.fixture(scope="module")
def reader(model: Path) -> Reader:
    return Reader(str(model), SIZE, recent=2 * SIZE)


@pytest.fixture(scope="module")
def prefilled(reader: Reader) -> PrefilledTrace:
    return read(reader, TEXT, 20 * SIZE, 80)


def read(reader: Reader, text: str, prefix: int, rest: int) -> PrefilledTrace:
    def ids(words: str) -> list[int]:
        return list(reader.tokenizer(words, add_special_tokens=False)["input_ids"])

    prompt, written = ids(PROMPT), ids(text)
    return reader.read(prompt, written[: prefix + rest - len(prompt)], prefix)


def test_a_cache_of_which_nothing_was_given_up_is_exact(
    reader: Reader, prefilled: PrefilledTrace
) -> None:
    exact = reader.judge(prefilled, {})
    assert exact.shape == (79, len(COLUMNS))
    assert exact[:, DAMAGE["kl"]].max() < 1e-6
    assert exact[:, DAMAGE["same_top"]].all()
    shared = reader.judge(prefilled, {8: 5, 9: 6})
    assert shared[:, DAMAGE["kl"]].mean() > 1e-6, "another block's KV must make a difference"


def test_an_fp8_cache_costs_less_than_a_wrong_block(
    reader: Reader, prefilled: PrefilledTrace
) -> None:
    narrow = reader.in_fp8(prefilled)
    for rounded, exact in ((narrow.keys, prefilled.keys), (narrow.values, prefilled.values)):
        assert rounded[0].equal(to_fp8(exact[0]))
        assert not rounded[1].equal(to_fp8(exact[1])), "it has read the rounded layer below"
        assert rounded[1].equal(to_fp8(rounded[1]))

    def kl(read: PrefilledTrace, donor_of: dict[int, int]) -> float:
        return float(reader.judge(read, donor_of)[:, DAMAGE["kl"]].mean())

    assert kl(prefilled, {}) < kl(narrow, {}) < kl(narrow, {8: 5, 9: 6})


def test_what_fp8_cannot_hold_becomes_the_largest_number() -> None:
    assert to_fp8(torch.tensor([1e4, -1e4, 0.3])).tolist() == [448.0, -448.0, 0.3125]


def test_position_is_taken_out_of_keys(prefilled: PrefilledTrace) -> None:
    """In the first layer a key is its token's alone, but for its position."""
    tokens = prefilled.tokens[: prefilled.prefix].numpy()
    first, last = (np.flatnonzero(tokens == ord("k") - 33)[[0, -1]]).tolist()
    upright, _ = prefilled.compared[0]
    assert first != last
    assert np.allclose(upright[first], upright[last], atol=1e-4)
    rotated = prefilled.keys[0].transpose(0, 1)
    assert not np.allclose(rotated[first], rotated[last], atol=1e-2)


def test_the_tensors_compared_are_those_asked_for(model: Path, prefilled: PrefilledTrace) -> None:
    distance = DistanceConfig(layers="all", tensors="v")
    values = read(Reader(str(model), SIZE, 2 * SIZE, distance), TEXT, 20 * SIZE, 80)
    assert len(values.compared) == len(prefilled.values)
    for (tensor, _), exact in zip(values.compared, prefilled.values, strict=True):
        assert tensor.equal(exact.transpose(0, 1))


def test_similarity_is_1_of_a_token_to_itself_and_less_of_others(prefilled: PrefilledTrace) -> None:
    some = np.arange(70, 90, dtype=np.int32)
    assert prefilled.similarity(some, some) == pytest.approx(np.ones(20), abs=1e-5)
    others = some[prefilled.tokens[some] != prefilled.tokens[some + 100]]
    assert prefilled.similarity(others, others + 100).max() < 0.5


@pytest.mark.parametrize("params", [OldestParams(name="oldest"), TwinsParams(name="twins")])
def test_what_is_given_up_is_within_the_budget_and_never_protected(
    reader: Reader, prefilled: PrefilledTrace, params: OldestParams | TwinsParams
) -> None:
    prefix = reader.give_up(prefilled, params, 0.25)
    assert (prefix.first, prefix.end, prefix.full, prefix.budget) == (2, 18, 20, 5)
    assert 0 < len(prefix.donor_of) <= prefix.budget
    for target, donor in prefix.donor_of.items():
        assert prefix.first <= target < prefix.end
        assert donor not in prefix.donor_of, "what stands in is still there"


def test_a_text_that_repeats_nothing_has_no_victims_for_twins(reader: Reader) -> None:
    draw = np.random.default_rng(0)
    text = "".join(chr(33 + c) for c in draw.integers(0, 90, 1000))
    nothing = read(reader, text, 20 * SIZE, 10)
    assert not reader.give_up(nothing, TwinsParams(name="twins"), 0.5).donor_of
    assert reader.give_up(nothing, OldestParams(name="oldest"), 0.5).donor_of


def test_a_policy_that_waits_for_stages_is_refused(
    reader: Reader, prefilled: PrefilledTrace
) -> None:
    with pytest.raises(ValueError, match="'paper' chooses no victims"):
        reader.give_up(prefilled, PaperParams(name="paper"), 0.5)


def test_steps_end_with_their_delimiters(reader: Reader, prefilled: PrefilledTrace) -> None:
    bounds = reader.steps(prefilled)
    assert bounds[0] == prefilled.prompt
    written = reader.tokenizer.decode(prefilled.tokens[: prefilled.prefix])
    assert all(written[:bound].endswith("\n\n") for bound in bounds[1:])


def test_kv_of_steps_is_alike_as_far_as_they_have_tokens_in_common(reader: Reader) -> None:
    prefilled = read(reader, "aaaaaaaaaabbbbbbbbbbaaaaaccccc" + "z" * 100, 4 * SIZE, 2)
    start = prefilled.prompt
    matrix = kv(prefilled, [start, start + 10, start + 20, start + 30])
    assert matrix[1, 0] == matrix[0, 1] == 0.0, "nothing in common"
    assert 0.3 < matrix[0, 2] <= 1.0, "all of the first step stands in the third"
    assert 0.1 < matrix[2, 0] < min(0.5, matrix[0, 2]), "half of the third stands in the first"


def test_every_token_has_its_mark(reader: Reader, prefilled: PrefilledTrace) -> None:
    twins = TwinsParams(name="twins")
    before, after = reader.give_up(prefilled, twins, 0.0), reader.give_up(prefilled, twins, 0.25)
    found = marks(prefilled, before, after, SIZE)
    assert len(found) == prefilled.prefix
    for position, mark in enumerate(found):
        gone = position // SIZE in after.donor_of
        assert (mark.kind == "gone") == gone
        if not gone:
            assert (mark.kind == "prompt") == (position < prefilled.prompt)
        if mark.twin >= 0:
            assert prefilled.tokens[mark.twin] == prefilled.tokens[position]
            assert mark.twin // SIZE != position // SIZE
    assert {mark.kind for mark in found} == {"prompt", "plain", "twin", "gone"}


@pytest.mark.parametrize(("kind", "name"), [("steps", "steps.svg"), ("trace", "trace.html")])
def test_a_text_is_drawn(model: Path, tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "story.txt").write_text(TEXT)
    output = tmp_path / name
    words = ["--traces", str(tmp_path), "--model", str(model), "--tokens", "600"]
    assert main(["plot", kind, *words, "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    if kind == "steps":
        assert ElementTree.fromstring(text).tag.endswith("svg")
    else:
        spans = re.findall(r'"text": ("(?:[^"\\]|\\.)*")', text)
        assert "".join(map(json.loads, spans)) == TEXT[:600]
        assert '"kind": "gone"' in text


def test_policies_are_studied_beside_compaction(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "story.json").write_text(json.dumps({"problem": PROMPT, "reasoning": TEXT}))
    arms = "oldest,compaction recency,compaction random"
    words = [
        "study", "--traces", str(tmp_path), "--model", str(model), "--arms", arms,
        "--prefix", "400",
        "--continuation", "80", "--recent", "64", "--freed", "0,0.25",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    study_policies.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "±" in line]
    nothing, some = rows[:3], rows[3:]
    assert [row[0].strip("| ") for row in some] == arms.split(",")
    damage = {row[0]: float(row[2].split()[0]) for row in rows}
    assert {row[1] for row in nothing} == {"0.0%"}
    assert {row[2].split()[0].lstrip("-") for row in nothing} == {"0.0000"}
    assert {row[1] for row in some} == {"25.0%"}
    assert len(set(damage.values())) == 3
    assert min(damage.values()) > 1e-3

    monkeypatch.setattr("sys.argv", [*words, "--kv", "fp8"])
    with pytest.raises(SystemExit):
        study_policies.main()
    assert "--kv fp8: compaction is judged over float32 alone" in capsys.readouterr().err


def test_replay_lets_every_arm_give_up_as_much(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "story.json").write_text(json.dumps({"problem": PROMPT, "reasoning": TEXT}))
    arms: list[dict[str, object]] = []

    def no_engine(target: str, argument: dict[str, Any], *rest: object) -> dict[str, object]:
        arms.append(argument["arm"])
        return {"freed": 0.0, "cells": [(0.0, 0.0)] * 4}

    monkeypatch.setattr(replay, "call_in_process", no_engine)
    words = ["--traces", str(tmp_path), "--model", str(model), "--freed", "0.4"]
    sizes = ["--prefix", "200", "--continuation", "40"]
    assert main(["replay", *words, *sizes, "--arms", "twins,compaction,oldest"]) == 0
    dense, *sharing = arms
    assert dense["memshare"] is None
    configs = [load_config(cast(Any, arm["memshare"]), environ={}) for arm in sharing]
    assert [config.policy.name for config in configs] == ["twins", "compaction", "oldest"]
    assert {config.max_given_up for config in configs} == {0.4}
