"""Replay through real engines, as a user would run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memshare.cli.main import main

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(600)]

STEPS = (
    "Let me add the numbers one by one. First, 17 plus 25 is 42.",
    "Wait, let me check that: 17 plus 20 is 37, and 37 plus 5 is 42. Good.",
    "Now multiply 42 by 3. Three times 40 is 120, three times 2 is 6, so 126.",
)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Two texts that repeat themselves, and one that is too short."""
    traces = tmp_path / "traces"
    traces.mkdir()
    for i in range(2):
        steps = (f"Attempt {k + i}. {STEPS[(k + i) % 3]}" for k in range(30))
        trace = {"problem": "What is (17 + 25) * 3?", "reasoning": "\n\n".join(steps)}
        (traces / f"{i}.json").write_text(json.dumps(trace))
    (traces / "short.json").write_text(json.dumps({"problem": "1 + 1?", "reasoning": "Two."}))
    return traces


@pytest.mark.usefixtures("smollm2")
def test_what_is_given_up_is_measured(
    traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    status = main(
        [
            "replay", "--traces", str(traces), "--prefix", "260", "--continuation", "44",
            "--arms", "twins,compaction", "--freed", "0,0.3", "--json", str(table),
        ]
    )  # fmt: skip
    assert status == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 texts"), "one is too short"
    assert "| twins | 0.0% |" in shown
    rows = json.loads(table.read_text())
    assert [row["arm"] for row in rows] == ["twins", "compaction"] * 2
    for nothing, some in zip(rows[:2], rows[2:], strict=True):
        kl, _late, _nll, same_top = (mean for mean, _ in nothing["cells"])
        assert nothing["freed"] == 0.0
        # The exact distributions are kept as float16.
        assert abs(kl) < 1e-4
        assert same_top > 0.95
        # Prompt and prefix fill 9 blocks; the tenth, which the continuation fills, does not count.
        assert some["freed"] == pytest.approx(2 / 9)
        assert some["cells"][0][0] > 1e-3 > kl


@pytest.mark.usefixtures("smollm2")
def test_the_report_says_what_could_be_given_up(
    traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["replay", "--observe", "--traces", str(traces), "--prefix", "400"]
    assert main([*words, "--text-only"]) == 0
    said, by_text = capsys.readouterr().out.split("\n", 1)
    assert said.startswith("2 texts, the first 400 tokens")
    assert main(words) == 0
    said_more, whole = capsys.readouterr().out.split("\n", 1)
    assert said_more.startswith(said), "and what the engine will do"
    assert whole.startswith(by_text)
    covered = {
        cells[1]: float(cells[2].rstrip("%"))
        for line in whole.removeprefix(by_text).splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) == 4 and "%" in cells[2]
    }
    assert covered["0.3"] >= covered["0.5"] >= covered["0.8"]
    assert covered["0.3"] > 10.0, "every sentence of these texts comes again"
    assert "uitable" in whole
