"""Pictures: what they are drawn from, and that they are drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from memshare.cli.main import main
from memshare.errors import UserError
from memshare.lab.bench.records import ArmRun, BenchRecord, StepMeasurement, TaskOutcome
from memshare.lab.plots.arms import panels
from memshare.lab.plots.pareto import Point, accuracy_points, by_policy
from memshare.lab.plots.steps import lexical, shared_steps
from memshare.lab.plots.style import figure
from memshare.lab.plots.trace import Mark, runs, with_twin, write_trace
from memshare.lab.plots.usage import in_use, plot_usage, rises

SVG = "{http://www.w3.org/2000/svg}"


def a_run(arm: str, seconds: float, right: list[bool], **fields: Any) -> ArmRun:
    moments = [
        StepMeasurement(seconds * i / 4, 3, 3, 90, 10 * i, 1, i // 2, i // 3) for i in range(5)
    ]
    settings: dict[str, Any] = {
        "arm": arm, "blocks": 40, "seconds": seconds, "cpu_seconds": 9.0, "steps": 5,
        "tokens": 1000,
        "preemptions": 2, "recomputed": 50, "running": 8.0, "peak": 10, "remaps": 1,
        "reclaimed": 1, "first_token": (0.1, 0.2), "between_tokens": (0.01, 0.02),
        "outcomes": [TaskOutcome("recall", 300, ok, 0.0) for ok in right], "block_outcomes": {},
        "timeline": moments,
    }  # fmt: skip
    return ArmRun(**settings | fields)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """Two repeats of two arms, as `memshare bench --json` writes them."""
    block_outcomes = {"prompt": 30, "recent window": 20, "last copy": 10, "given up": 40}
    repeats = [
        [
            a_run("dense", 10.0, [True] * 10),
            a_run("twins", 8.0, [True] * 9 + [False], block_outcomes=block_outcomes),
        ],
        [
            a_run("twins", 4.0, [True] * 9 + [False], block_outcomes=block_outcomes),
            a_run("dense", 10.0, [True] * 10),
        ],
    ]
    arms: dict[str, dict[str, Any] | None] = {"dense": None, "twins": {"mode": "share"}}
    path = tmp_path / "record.json"
    BenchRecord(32, 256, 2048, [10] * 10, arms, repeats).save(path)
    return path


def test_accuracy_points_are_ratios_within_a_repeat(record: Path) -> None:
    dense, twins = accuracy_points(BenchRecord.load(record))["recall"]
    assert (dense.gain, dense.cost) == (1.0, 100.0)
    assert twins.gain == pytest.approx((10 / 8 + 10 / 4) / 2)
    assert twins.cost == 90.0
    assert twins.low < 90.0 < twins.high


def test_work_is_counted_as_asked(record: Path) -> None:
    loaded = BenchRecord.load(record)
    for repeat in loaded.repeats:
        repeat[:] = [replace(run, steps=run.steps * (1 + (run.arm == "dense"))) for run in repeat]
    _, twins = accuracy_points(loaded, lambda run: run.tokens_per_step)["recall"]
    assert twins.gain == pytest.approx(2.0)


def test_groups_are_not_pooled(record: Path) -> None:
    loaded = BenchRecord.load(record)
    for run in (run for repeat in loaded.repeats for run in repeat):
        run.outcomes.extend([TaskOutcome("chain", 300, True, 0.0)] * 10)
    groups = accuracy_points(loaded)
    assert list(groups) == ["chain", "recall"]
    assert [point.cost for point in groups["chain"]] == [100.0, 100.0]
    assert [point.cost for point in groups["recall"]] == [100.0, 90.0]


def test_a_repeat_that_was_stopped_before_the_first_arm_gives_no_ratio(record: Path) -> None:
    loaded = BenchRecord.load(record)
    del loaded.repeats[1][1]
    _, twins = accuracy_points(loaded)["recall"]
    assert twins.gain == pytest.approx(10 / 8), "of the first repeat alone"


def test_usage_is_of_the_runs_own_blocks_and_every_rise_is_seen() -> None:
    run = a_run("fp8", 4.0, [True], blocks=80)
    assert in_use(run) == [0.0, 12.5, 25.0, 37.5, 50.0]
    assert rises(run.timeline, "preemptions") == [2.0, 4.0]
    first = run.timeline[0]._replace(preemptions=1)
    assert rises([first, *run.timeline[3:]], "preemptions") == [0.0, 4.0]


def test_panels_fill_the_picture(tmp_path: Path) -> None:
    """Also where an arm has nothing to mark: plain vLLM re-points no block."""
    quiet = [moment._replace(remaps=0) for moment in a_run("dense", 4.0, [True]).timeline]
    runs = [a_run("dense", 4.0, [True], timeline=quiet), a_run("twins", 4.0, [True])]
    record = BenchRecord(32, 256, 2048, [10], {"dense": None, "twins": {}}, [runs])
    plot_usage(record, ["dense", "twins"], tmp_path / "usage.png")
    pixels = np.asarray(Image.open(tmp_path / "usage.png").convert("L"))
    assert (pixels < 250).any(axis=1).mean() > 0.8, "rows that are not empty"


def test_budgets_of_one_policy_are_joined() -> None:
    points = [Point(arm, gain, 0, 0, 0) for arm, gain in [("x 0.5", 2), ("y", 1), ("x 0.25", 1)]]
    joined = {policy: [p.arm for p in mine] for policy, mine in by_policy(points).items()}
    assert joined == {"y": ["y"], "x": ["x 0.25", "x 0.5"]}


@pytest.mark.parametrize("kind", ["arms", "usage", "pareto"])
def test_a_stopped_comparison_shows_the_arms_that_ran(
    record: Path, tmp_path: Path, kind: str
) -> None:
    loaded = BenchRecord.load(record)
    loaded.arms["oldest"] = {"mode": "share"}
    loaded.save(record)
    assert [bar.arm for bar in panels(loaded)["preemptions"]] == ["dense", "twins"]
    output = tmp_path / "picture.svg"
    assert main(["plot", kind, str(record), "--output", str(output)]) == 0
    assert output.exists()


def test_pieces_of_a_comparison_are_one(record: Path, tmp_path: Path) -> None:
    loaded = BenchRecord.load(record)
    runs = [a_run("compaction", 5.0, [True] * 8 + [False] * 2)]
    other = replace(loaded, arms={"compaction": {"mode": "share"}}, repeats=[runs])
    whole = BenchRecord.together([loaded, other])
    assert list(whole.arms) == ["dense", "twins", "compaction"]
    assert [[run.arm for run in repeat] for repeat in whole.repeats] == [
        ["dense", "twins", "compaction"], ["twins", "dense"]
    ]  # fmt: skip
    assert loaded == BenchRecord.load(record), "not modified"
    with pytest.raises(UserError, match="have the arm 'dense'"):
        BenchRecord.together([loaded, loaded])
    with pytest.raises(UserError, match="different requests"):
        BenchRecord.together([loaded, replace(other, prompts=[11] * 10)])

    piece, output = tmp_path / "piece.json", tmp_path / "picture.svg"
    other.save(piece)
    words = ["plot", "pareto", str(record), str(piece), "--output", str(output)]
    assert main(words) == 1, "seconds of two records say nothing"
    assert not output.exists()
    assert main([*words, "--work", "step"]) == 0
    assert "compaction" in output.read_text()


def test_panels_count_all_repeats(record: Path) -> None:
    found = panels(BenchRecord.load(record))
    dense, twins = found["correct answers, recall (%)"]
    assert (dense.label, dense.high) == ("20/20", 100.0)
    assert (twins.label, twins.height) == ("18/20", 90.0)
    assert twins.low < 90.0 < twins.high
    assert [bar.label for bar in found["preemptions"]] == ["2", "2"]
    assert [bar.label for bar in found["tokens per engine step"]] == ["200.0", "200.0"]


@pytest.mark.parametrize("kind", ["arms", "usage", "waterfall", "pareto"])
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_records_are_drawn(record: Path, tmp_path: Path, kind: str, ending: str) -> None:
    output = tmp_path / f"picture.{ending}"
    assert main(["plot", kind, str(record), "--output", str(output)]) == 0
    if ending == "png":
        assert output.read_bytes().startswith(b"\x89PNG")
        return
    assert ElementTree.parse(output).getroot().tag == f"{SVG}svg"
    first = output.read_bytes()
    assert main(["plot", kind, str(record), "--output", str(output)]) == 0
    assert output.read_bytes() == first, "the same data, the same file"


def test_damage_of_replay_is_drawn(tmp_path: Path) -> None:
    cells = [[0.01, 0.002], [0.005, 0.001], [0.0, 0.1], [0.96, 0.01]]
    rows = [{"arm": arm, "wanted": 0.25, "freed": 0.24, "cells": cells} for arm in ("twins", "x")]
    table, output = tmp_path / "table.json", tmp_path / "pareto.svg"
    table.write_text(json.dumps(rows))
    assert main(["plot", "pareto", str(table), "--output", str(output)]) == 0
    assert output.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["usage", "RECORD", "--arms", "dense,fp8"], "has no arm 'fp8'; it has dense, twins"),
        (["waterfall", "RECORD", "--arm", "dense"], "is plain vLLM"),
        (["pareto", "MISSING"], "No such file"),
        (["usage", "MISSING"], "is no record"),
        (["trace", "--traces", "."], "end it in .html"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    record: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RECORD": str(record), "MISSING": str(tmp_path / "missing.json")}
    output = ["--output", str(tmp_path / "out.svg")]
    assert main(["plot", *(names.get(word, word) for word in words), *output]) == 1
    assert said in capsys.readouterr().err


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"picture\.xyz: its ending must be one of .*svg"),
        figure(tmp_path / "picture.xyz"),
    ):
        pass


def test_steps_are_alike_by_their_words() -> None:
    matrix = lexical([1, 2, 3, 1, 2, 3, 7, 8], [0, 3, 6, 8])
    assert matrix == pytest.approx(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], np.float32))


def test_blocks_belong_to_the_step_in_their_middle() -> None:
    # Blocks of 4: block 0 lies in step 0, block 2 in step 2; block 9 is behind all steps.
    assert shared_steps({0: 2, 1: 9}, 4, [0, 5, 8, 14]) == {(0, 2)}


def test_neighbours_with_neighbouring_twins_are_one_run() -> None:
    marks = [
        Mark("prompt", -1, 0.0), Mark("prompt", -1, 0.0), Mark("gone", 10, 0.5),
        Mark("gone", 11, 0.7), Mark("gone", 20, 0.7), Mark("plain", -1, 0.0),
        Mark("plain", -1, 0.0),
    ]  # fmt: skip
    assert [(run.start, run.end, run.kind, run.twin) for run in runs(marks)] == [
        (0, 2, "prompt", -1), (2, 4, "gone", 10), (4, 5, "gone", 20), (5, 7, "plain", -1),
    ]  # fmt: skip


def test_twins_are_counted_by_where_they_stand() -> None:
    marks = [Mark("twin", 2, 0.5), Mark("plain", -1, 0.0), Mark("gone", 0, 0.5), Mark("twin", 0, 1)]
    assert with_twin(marks) == (0.25, 0.5)


def test_the_page_holds_the_text_and_where_arcs_end(tmp_path: Path) -> None:
    tokens = [b"</script>", b" caf\xc3", b"\xa9", b" x", b" caf\xc3", b"\xa9"]
    marks = [
        Mark("plain", -1, 0.0), Mark("gone", 4, 0.5), Mark("gone", 5, 0.5), Mark("plain", -1, 0.0),
        Mark("plain", -1, 0.0), Mark("plain", -1, 0.0),
    ]  # fmt: skip
    path = tmp_path / "trace.html"
    write_trace(tokens, marks, "a title", {"model": "m"}, path)
    page = path.read_text(encoding="utf-8")
    payload = page.partition('type="application/json">')[2].partition("</script>")[0]
    spans = json.loads(payload)["spans"]
    assert "".join(span["text"] for span in spans) == "</script> café x café"
    gone = next(span for span in spans if span["kind"] == "gone")
    assert gone["text"] == " café"
    assert spans[gone["twin"]]["text"] == " café"
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "it works offline"
