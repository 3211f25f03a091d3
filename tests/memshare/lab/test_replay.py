"""Replay without an engine: reading traces, and measuring distributions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from memshare.cli.main import main
from memshare.errors import UserError
from memshare.lab.replay.divergence import Divergence, measure
from memshare.lab.replay.traces import RecordedText, load_traces


def log_probs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_measurements_are_those_of_the_definition() -> None:
    exact, shared = log_probs([0.5, 0.25, 0.25]), log_probs([0.25, 0.5, 0.25])
    kl, delta_nll, same_top = measure(exact, shared, torch.tensor([0]))[0].tolist()
    assert kl == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert delta_nll == pytest.approx(math.log(2)), "the token is half as likely"
    assert same_top == 0.0
    assert measure(exact, exact, torch.tensor([1])).tolist() == [[0.0, 0.0, 1.0]]


def test_what_has_no_weight_does_not_count() -> None:
    exact, shared = log_probs([1.0, 0.0]), log_probs([0.5, 0.5])
    assert measure(exact, shared, torch.tensor([0]))[0, 0].item() == pytest.approx(math.log(2))
    assert measure(exact, log_probs([1.0, 0.0]), torch.tensor([0]))[0, 0].item() == 0.0


def test_damage_is_a_mean_over_traces_with_its_error() -> None:
    traces = [np.array([[k, 0, 1], [3 * k, 0, 0]], np.float32) for k in (1.0, 2.0)]
    damage = Divergence.of(traces)
    assert damage.kl == (3.0, 1.0), "means 2 and 4"
    assert damage.late_kl[0] == 4.5
    assert damage.same_top == (0.5, 0.0)
    assert math.isnan(Divergence.of(traces[:1]).kl[1]), "one trace has no spread"


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_traces_are_read_in_order_from_any_depth(tmp_path: Path) -> None:
    write(tmp_path, "b/2.json", {"problem": "p2", "reasoning": "r2", "id": 7})
    write(tmp_path, "a/1.json", {"problem": "p1", "reasoning": "r1"})
    write(tmp_path, "a/readme.md", "no trace")
    assert list(load_traces(tmp_path)) == [
        RecordedText("1", "p1", "r1"),
        RecordedText("2", "p2", "r2"),
    ]


def test_texts_and_logs_are_traces_too(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "Wait.\n")
    lines = [{"prompt": "p", "completion": "c", "model": "m"}, {"problem": "q", "reasoning": "r"}]
    write(tmp_path, "b.jsonl", "\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert list(load_traces(tmp_path)) == [
        RecordedText("a", "", "Wait.\n"),
        RecordedText("b:1", "p", "c"),
        RecordedText("b:3", "q", "r"),
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "p", "reasoning": "r"}'])
def test_a_wrong_line_of_a_log_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path, "log.jsonl", f'{{"prompt": "p", "completion": "c"}}\n{line}\n')
    traces = load_traces(tmp_path)
    assert next(traces).name == "log:1"
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: "):
        next(traces)


@pytest.mark.parametrize("name", ["wrong.txt", "wrong.json", "wrong.jsonl"])
def test_what_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=rf"{name}: .*decode"):
        list(load_traces(tmp_path))


@pytest.mark.parametrize(
    "content", ["{", "[]", {"problem": "p"}, {"problem": "p", "reasoning": 5}, '"text"'], ids=repr
)
def test_a_wrong_trace_is_named(tmp_path: Path, content: object) -> None:
    write(tmp_path, "wrong.json", content)
    with pytest.raises(UserError, match=r"wrong\.json"):
        list(load_traces(tmp_path))


def test_a_folder_without_traces_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no"):
        list(load_traces(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "twins,best"], "no arm 'best'"),
        (["--freed", "0.5,2"], "--freed 0.5,2"),
        (["--freed", "half"], "--freed half"),
        ([], "--traces DIR"),
        (["--traces", "x", "--text-only"], "--text-only is a part of --observe"),
        (["--traces", "x", "--observe", "--json", "t.json"], "--observe has no table"),
    ],
)
def test_a_wrong_option_is_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", *words]) == 1
    assert said in capsys.readouterr().err
