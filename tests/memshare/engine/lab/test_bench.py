"""bench and eval through real engines, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memshare.cli.main import main
from memshare.lab.bench.records import BenchRecord
from memshare.lab.simulate.costs import StepCosts
from memshare.lab.simulate.run import PredictedEngine, SimulatedJob, simulate
from tests.machine import DTYPE

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(900)]

PROBLEMS = ["--model", "smollm2-135m-reasoner", "--dtype", DTYPE]
SHORT = 486  # of eight problems from here on, the longest solution is shorter than elsewhere
SHORT_CHAINS = 502  # the same of two chains


def test_the_reasoner_is_right_and_without_pressure_nothing_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "record.json"
    status = main(
        [
            "bench", *PROBLEMS, "--workload", "problems", "--requests", "8", "--seed", str(SHORT),
            "--memory", "1.5", "--arms", "dense,twins", "--repeats", "1", "--json", str(file),
        ]
    )  # fmt: skip
    assert status == 0
    dense, twins = BenchRecord.load(file).repeats[0]
    assert sum(bool(outcome.right) for outcome in dense.outcomes) >= 7
    assert [o[:3] for o in twins.outcomes] == [o[:3] for o in dense.outcomes]
    assert twins.remaps == twins.preemptions == dense.preemptions == 0
    assert dense.tokens / 8 >= 550
    assert sum(outcome.cut for outcome in dense.outcomes) <= 1
    shown = capsys.readouterr().out
    assert "| twins | 4 recall |" in shown
    assert "| ratio |" in shown


def test_recorded_tokens_are_written_under_pressure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "record.json"
    status = main(
        [
            "bench", "--workload", "solutions", "--requests", "4", "--tokens", "300",
            "--dtype", DTYPE, "--memory", "0.7", "--recent", "32", "--arms", "dense,twins",
            "--repeats", "1", "--json", str(file),
        ]
    )  # fmt: skip
    assert status == 0
    record = BenchRecord.load(file)
    dense, twins = record.repeats[0]
    assert dense.tokens == twins.tokens == 4 * 300
    assert dense.preemptions > 0
    assert twins.reclaimed > 0
    assert twins.tokens_per_step > dense.tokens_per_step
    assert record.arms["dense"] is None
    # The simulator runs the same scheduler on the same lengths: it needs the same steps.
    engine = PredictedEngine(
        dense.blocks, record.block_size, record.max_num_seqs, record.max_num_batched_tokens,
        StepCosts(0.01, 0.001, 0.001, 0.0),
    )  # fmt: skip
    jobs = [SimulatedJob(0.0, prompt, 300) for prompt in record.prompts]
    predicted = simulate(engine, jobs, None)
    assert predicted.steps == pytest.approx(dense.steps, rel=0.03)
    assert predicted.preemptions == pytest.approx(dense.preemptions, abs=2)
    capsys.readouterr()
    assert main(["simulate", "--measured", str(file), str(file)]) == 0
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines() if "| record |" in row]
    rows = [row for row in rows if row[2].strip() != "arm"]
    assert [row[2].strip() for row in rows] == ["dense", "twins"] * 2
    (measured, plain), (_, shared) = (map(int, row[6:8]) for row in rows[:2])
    assert plain == pytest.approx(measured, rel=0.03)
    assert shared < plain, (
        "how many blocks go is known to it, not which: with four requests it errs"
    )


def test_an_engine_is_asked_and_graded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two answers of some 16 blocks each, and memory for 25."""
    file = tmp_path / "answers.json"
    words = ["eval", *PROBLEMS, "--suite", "chain", "--limit", "2", "--seed", str(SHORT_CHAINS)]
    words += ["--arms", "twins", "--blocks", "26", "--max-tokens", "600"]
    assert main([*words, "--eager", "--json", str(file)]) == 0
    answers = json.loads(file.read_text())
    assert [answer["question"] for answer in answers] == ["502", "503"]
    assert all("The final answer is" in answer["text"] for answer in answers)
    assert any(answer["right"] for answer in answers)
    touched = sum(answer["blocks_given_up"] > 0 for answer in answers)
    assert touched > 0
    assert capsys.readouterr().out.rstrip().endswith(f"| {touched} |")
