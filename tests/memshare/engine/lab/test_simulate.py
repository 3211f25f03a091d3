"""simulate through vLLM's real scheduler, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from memshare.cli.main import main
from memshare.lab.simulate.costs import StepCosts
from memshare.lab.simulate.run import PredictedEngine, SimulatedJob, by_age, simulate

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[4]
DEPLOYMENT = ROOT / "configs" / "simulate" / "qwq-32b-4xh100.yaml"


def test_a_simulated_engine_gains_by_sharing_and_only_under_pressure() -> None:
    costs = StepCosts(0.02, 0.0, 0.0001, 1e-7)
    jobs = [SimulatedJob(0.0, 45, 400)] * 24
    for blocks, gains in ((109, True), (400, False)):
        engine = PredictedEngine(blocks, 32, 64, 2048, costs)
        half = by_age({"budget": {"max_shared_fraction": 0.5}})
        dense, shared = simulate(engine, jobs, None), simulate(engine, jobs, half)
        assert dense.tokens == shared.tokens == 24 * 400
        assert simulate(engine, jobs, None) == dense, "the same every time"
        if gains:
            assert shared.tokens_per_second > 1.1 * dense.tokens_per_second
            assert shared.preemptions < dense.preemptions
            without = [job._replace(opportunity=0.0) for job in jobs]
            found = simulate(engine, without, half)
            assert found.remaps == 0
            assert found.tokens_per_second < shared.tokens_per_second
        else:
            assert shared == dense
            assert shared.remaps == 0


def test_dropped_tokens_are_not_read_by_attention() -> None:
    """Compaction frees no more than remaps do here; its steps are shorter."""
    jobs = [SimulatedJob(0.0, 45, 400)] * 24
    engine = PredictedEngine(109, 32, 64, 2048, StepCosts(0.001, 0.0, 0.0, 1e-5))
    budget = {"budget": {"max_shared_fraction": 0.5, "max_dropped_fraction": 0.5}}
    remapped = simulate(engine, jobs, by_age(budget))
    compacted = simulate(engine, jobs, by_age(budget | {"policy": {"name": "compaction"}}))
    assert compacted.remaps > 10
    assert compacted.seconds / compacted.steps < 0.9 * remapped.seconds / remapped.steps


@pytest.mark.complete
def test_a_deployment_by_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = DEPLOYMENT.read_text(encoding="utf-8")
    small = tmp_path / "small.yaml"
    small.write_text(text.replace("memory_gb: 80", "memory_gb: 22.8"))
    words = ["simulate", "--deployment", str(small), "--requests", "24", "--output", "1000-2000"]
    assert main([*words, "--freed", "0.5"]) == 0
    dense, shared = capsys.readouterr().out.strip().splitlines()[-2:]
    assert dense.split("|")[4].strip() == "dense"
    assert float(shared.split("|")[6]) > 1.0, "faster under pressure"
    words = ["simulate", "--deployment", str(DEPLOYMENT), "--requests", "1", "--output", "90000"]
    assert main([*words, "--accelerators", "1,4", "--freed", "0.5"]) == 0
    one, *four = capsys.readouterr().out.strip().splitlines()[-3:]
    assert "cannot run: the longest request needs" in one
    assert [row.split("|")[1].strip() for row in four] == ["4", "4"]
