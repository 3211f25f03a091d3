"""Workloads and reports of comparisons, without an engine."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.cli.main import main
from memshare.errors import UserError
from memshare.lab.bench.engine_process import call_in_process
from memshare.lab.bench.records import ArmRun, BenchPlan, BenchRecord, StepMeasurement, TaskOutcome
from memshare.lab.bench.report import (
    accuracy_cells,
    accuracy_table,
    interval,
    remarks,
    speed_table,
    spread,
    wilson,
)
from memshare.lab.bench.workloads import Source, Task, build
from memshare.lab.problems import read_answer
from memshare.process_env import engine_env
from memshare.small_model.names import tokenizer_of


class Words:
    """A tokenizer of one token a character."""

    name_or_path = "words"
    chat_template: str | None = "<>"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) for char in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return f"<{messages[0]['content']}>"


def source(**options: Any) -> Source:
    settings: dict[str, Any] = {"tokenizer": Words(), "count": 6, "tokens": 50} | options
    return Source(**settings)


def a_run(arm: str, **fields: Any) -> ArmRun:
    settings: dict[str, Any] = {
        "arm": arm, "blocks": 80, "seconds": 10.0, "cpu_seconds": 9.0, "steps": 100, "tokens": 1000,
        "preemptions": 4, "recomputed": 50, "running": 8.0, "peak": 10, "remaps": 0,
        "reclaimed": 0, "first_token": (0.1, 0.2), "between_tokens": (0.01, 0.02),
        "outcomes": [TaskOutcome("recall", 300, True, 0.0), TaskOutcome("recall", 320, False, 0.0)],
        "block_outcomes": {},
        "timeline": [StepMeasurement(0.1, 2, 2, 64, 3, 1, 0, 0)],
    }  # fmt: skip
    return ArmRun(**settings | fields)


def test_problems_come_in_both_families_with_their_answers() -> None:
    tasks = build("problems", source())
    assert {task.group for task in tasks} == {"chain", "recall"}
    assert all(task.answer is not None and task.ends and task.forced is None for task in tasks)
    assert build("problems", source(seed=1000)) != tasks


def test_solutions_are_forced_to_their_ends() -> None:
    for task in build("solutions", source(tokens=10**6)):
        assert task.forced is not None
        assert len(task.forced) == task.max_tokens
        assert read_answer("".join(map(chr, task.forced))) is not None
    assert {task.max_tokens for task in build("solutions", source())} == {50}


def test_traces_go_on_where_the_last_round_ended(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"problem": "p", "reasoning": "abcdefghij"}')
    tasks = build("traces", source(tokens=4, count=3, traces=tmp_path))
    assert ["".join(map(chr, task.forced or ())) for task in tasks] == ["abcd", "efgh"]
    with pytest.raises(UserError, match="lower --tokens"):
        build("traces", source(tokens=11, traces=tmp_path))
    with pytest.raises(UserError, match="--traces DIR"):
        build("traces", source())


def test_a_model_that_cannot_be_asked_is_told() -> None:
    words = Words()
    words.chat_template = None
    with pytest.raises(UserError, match="--model words has no chat template"):
        source(tokenizer=words).chat("How much?")
    with pytest.raises(UserError, match="--model /nowhere: its tokenizer"):
        tokenizer_of("/nowhere")


def test_chats_differ_from_each_other() -> None:
    tasks = build("chat", source(count=96))
    assert len({tuple(task.prompt) for task in tasks}) == 96
    with pytest.raises(UserError, match="96 different"):
        build("chat", source(count=97))


@given(right=st.integers(0, 200), wrong=st.integers(0, 200))
def test_the_interval_holds_the_share_and_stays_within_0_and_1(right: int, wrong: int) -> None:
    if right + wrong:
        low, high = wilson(right / (right + wrong), right + wrong)
        assert 0.0 <= low <= right / (right + wrong) <= high <= 1.0


def test_the_interval_is_wilsons() -> None:
    low, high = wilson(190 / 200, 200)
    assert (round(low, 4), round(high, 4)) == (0.9104, 0.9726)


def test_answers_to_one_question_are_no_independent_ones() -> None:
    one = interval([[True]] * 20 + [[False]] * 20)
    # Asked four times, with the same result each time, no more is known.
    assert interval([[True] * 4] * 20 + [[False] * 4] * 20) == pytest.approx(one, abs=0.01)
    # Where the answer is chance, each one counts.
    every = wilson(0.5, 160)
    assert interval([[True, False, True, False]] * 40) == pytest.approx(every)
    draw = random.Random(0)
    chance = [[draw.random() < 0.5 for _ in range(4)] for _ in range(40)]
    low, high = interval(chance)
    assert high - low == pytest.approx(every[1] - every[0], abs=0.02)
    assert high - low < 0.7 * (one[1] - one[0])
    assert interval([[True] * 4] * 40) == wilson(1.0, 40)
    assert interval([[True, False]]) == wilson(0.5, 1)


def test_a_change_is_paired() -> None:
    base = [[True]] * 90 + [[False]] * 10
    worse = [[True]] * 88 + [[False]] * 12
    assert accuracy_cells(base, base)[-1] == "-"
    count, share, _, change = accuracy_cells(worse, base)
    assert (count, share) == ("100", "88.0%")
    assert change == "-2.0 ± 2.8"
    assert accuracy_cells([[False]], [[True]])[-1] == "-100.0", "one question has no interval"


def test_lengths_are_paired() -> None:
    def runs(arm: str, lengths: list[int]) -> list[Any]:
        return [a_run(arm, outcomes=[TaskOutcome("recall", n, True, 0.0) for n in lengths])]

    made = [runs("dense", [100, 300, 500]) + runs("compaction", [110, 310, 520])]
    table = accuracy_table(["dense", "compaction"], made)
    assert table is not None
    assert "| 300 |" in table
    assert "| 313 (+13 ± 7) |" in table


def test_ratios_are_taken_within_a_repeat() -> None:
    repeats = [
        [a_run("dense", seconds=10.0), a_run("twins", seconds=5.0)],
        [a_run("twins", seconds=20.0), a_run("dense", seconds=30.0)],
    ]
    lines = speed_table(["dense", "twins"], repeats).splitlines()
    assert lines[2].split(" | ")[2] == "1", "it is the measure"
    assert "| 1.75 (1.50-2.00) |" in lines[3], "not of the medians of each"
    accuracy = accuracy_table(["dense", "twins"], repeats)
    assert accuracy is not None
    assert "| twins | 4 recall | 50.0% |" in accuracy
    nothing = [[a_run("dense", outcomes=[TaskOutcome("traces", 5, None, 0.0)])]]
    assert accuracy_table(["dense"], nothing) is None


def test_one_repeat_has_no_ratio() -> None:
    """Two runs alone differ by what else the machine did: by 2.92 times, once."""
    repeats = [[a_run("dense", seconds=29.2), a_run("twins", seconds=10.0, reclaimed=3)]]
    lines = speed_table(["dense", "twins"], repeats).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == ["1", "-"]
    assert remarks(["twins"], "dense", repeats) == [
        "No ratios: one repeat has no spread. Ask for more with --repeats."
    ]
    equal = [[a_run("dense"), a_run("twins", reclaimed=3)]] * 2
    assert "| 1.00 (1.00-1.00) |" in speed_table(["dense", "twins"], equal)
    assert remarks(["twins"], "dense", equal) == []
    assert remarks([], "dense", [[a_run("dense")]]) == [], "there is nothing to compare"


def test_that_nothing_was_reclaimed_is_said() -> None:
    calm = [a_run("dense", preemptions=0), a_run("twins", preemptions=0)]
    short = [a_run("dense"), a_run("twins")]
    used = [a_run("dense"), a_run("twins", reclaimed=9)]
    [line] = remarks(["twins"], "dense", [calm, calm])
    assert line.startswith("twins reclaimed nothing: memory was never short. Ask for less")
    [line] = remarks(["twins"], "dense", [calm, used, used])
    assert line.startswith("twins reclaimed nothing in 1 of 3 repeats: memory was never short")
    [line] = remarks(["twins"], "dense", [short, used])
    assert line.startswith("twins reclaimed nothing in 1 of 2 repeats: memory was short, but")
    assert line.endswith("Its speed there says nothing about sharing.")


def test_one_value_has_no_spread() -> None:
    assert spread([2.0, 2.0], 1) == "2.0"
    assert spread([1.0, 3.0, 2.0], 0) == "2 (1-3)"


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    record = BenchRecord(32, 64, 2048, [10, 12], {"dense": None}, [[a_run("dense")]])
    record.save(tmp_path / "r.json")
    assert BenchRecord.load(tmp_path / "r.json") == record
    (tmp_path / "other.json").write_text('{"repeats": []}')
    with pytest.raises(UserError, match=r"other\.json"):
        BenchRecord.load(tmp_path / "other.json")


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    tasks = [Task("recall", [1, 2], 5, answer=3, expected=4), Task("chat", [1], 2, forced=[7, 8])]
    plan = BenchPlan("model", "float32", 32, 80, 100, 64, 2048, tasks, eager=False)
    plan.save(tmp_path / "plan.json")
    assert BenchPlan.load(tmp_path / "plan.json") == plan
    assert [(task.need, task.longest) for task in tasks] == [(6, 7), (3, 3)]


def test_a_child_is_another_process_and_its_failure_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("MEMSHARE_MODE", "observe")
    function = "child:in_child"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told: list[dict[str, int]] = []
    found = call_in_process(function, {"fail": None}, "the test", "hub/model", told.append)
    assert told == [{"written": 0, "total": 3}]
    assert found["pid"] != os.getpid()
    assert found["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "MEMSHARE_MODE" not in found["environment"], "arms say how MemShare is configured"
    assert found["environment"].items() >= engine_env({}).items(), "prepared for an engine"
    assert found["environment"].get("HF_HUB_OFFLINE") == os.environ.get("HF_HUB_OFFLINE")
    local = call_in_process(function, {"fail": None}, "the test", str(Path(__file__).parent))
    assert local["environment"]["HF_HUB_OFFLINE"] == os.environ.get("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"the test failed(.|\n)*as asked"):
        call_in_process(function, {"fail": "raise"}, "the test", "hub/model")
    with pytest.raises(UserError, match=r"the test was ended by signal 9(.|\n)*\(nothing\)"):
        call_in_process(function, {"fail": "die"}, "the test", "hub/model")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "--arms", "dense,best"], "no arm 'best'"),
        (["bench", "--budget", "2"], "--budget 2"),
        (["bench", "--arms", "dense,dense"], "--arms: dense comes twice"),
        (["eval", "--samples", "4"], "--temperature"),
        (["simulate"], "either --deployment or --measured"),
        (["simulate", "--deployment", "x", "--measured", "y"], "either"),
        (["simulate", "--deployment", "/nowhere.yaml"], "/nowhere.yaml"),
        (["simulate", "--measured", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_a_wrong_option_is_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "--repeats", "0"], "argument --repeats: 0: give a whole number from 1 on"),
        (["bench", "--tokens", "1.5"], "argument --tokens: 1.5"),
        (["bench", "--json", "/nowhere/r.json"], "there is no folder /nowhere"),
        (["replay", "--json", "/"], "argument --json: / is a folder"),
        (["replay", "--limit", "0"], "argument --limit"),
        (["eval", "--limit", "0"], "argument --limit"),
        (["eval", "--samples", "-1"], "argument --samples"),
        (["eval", "--recent", "-1"], "argument --recent: -1: give a whole number from 0 on"),
        (["bench", "--recent", "x"], "argument --recent: x"),
        (["bench", "--thinning", "1.2"], "argument --thinning: 1.2: give a number from 0 to 1"),
        (["simulate", "--recent", "-1"], "argument --recent"),
        (["simulate", "--rate", "0"], "argument --rate: 0: give a number above 0"),
        (["simulate", "--rate", "inf"], "argument --rate: inf"),
        (["plot", "steps", "--freed", "2"], "argument --freed: 2: give a number from 0 to 1"),
        (["plot", "steps", "--freed", "nan"], "argument --freed: nan"),
        (["plot", "trace", "--tokens", "0"], "argument --tokens"),
        (["plot", "arms", "r.json", "--output", "/nowhere/x.svg"], "no folder /nowhere"),
    ],
)
def test_a_value_that_cannot_be_is_refused_at_once(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_help_says_every_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "runs of every arm (default: 3)" in shown
    assert "(default: smollm2-135m-reasoner where answers are graded" in shown
    assert "(default: None)" not in shown
    assert "(default: False)" not in shown
