"""How far a comparison is, and how long it is said to take, without an engine."""

from __future__ import annotations

import io
import logging
import sys
import time
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from memshare.lab.bench import progress
from memshare.lab.bench.estimate import Speed, Work, estimate, in_words, measure
from memshare.lab.bench.progress import ProgressBars, follow


@dataclass
class Request:
    """What a bar needs of vLLM's request."""

    max_tokens: int
    ignores_end: bool = False
    num_output_tokens: int = 0

    @property
    def sampling_params(self) -> SimpleNamespace:
        return SimpleNamespace(ignore_eos=self.ignores_end)


@dataclass
class Engine:
    """An engine that writes a token of every request in a step; some end early."""

    requests: dict[str, Request]
    ends: dict[str, int] = field(default_factory=dict)

    @property
    def engine_core(self) -> SimpleNamespace:
        scheduler = SimpleNamespace(requests=self.requests)
        return SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))

    def step(self) -> list[str]:
        for name, request in list(self.requests.items()):
            request.num_output_tokens += 1
            if request.num_output_tokens > self.ends.get(name, request.max_tokens):
                del self.requests[name]
        return ["outputs"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """What engines have told, without the pause between two times."""
    found: list[dict[str, int]] = []
    monkeypatch.setattr(progress.ProgressTeller, "tell", lambda _, **counts: found.append(counts))
    return found


def test_an_engine_tells_what_is_written(told: list[dict[str, int]]) -> None:
    engine = Engine({"a": Request(2, ignores_end=True), "b": Request(4, ignores_end=True)})
    follow(engine, likely=1)
    assert [engine.step() for _ in range(5)] == [["outputs"]] * 5, "as before"
    assert [(one["written"], one["total"], one["ended"]) for one in told] == [
        (2, 6, 0), (4, 6, 0), (5, 6, 1), (6, 6, 1), (6, 6, 2)
    ]  # fmt: skip
    assert {one["requests"] for one in told} == {2}


def test_answers_that_may_end_are_taken_to_be_as_long_as_others(
    told: list[dict[str, int]],
) -> None:
    engine = Engine({name: Request(100) for name in "abc"}, ends={"a": 2})
    follow(engine)
    for _ in range(3):
        engine.step()
    assert [one["total"] for one in told] == [300, 300, 2 + 3 + 3], "never less than is written"
    likely = Engine({"a": Request(100), "b": Request(10)})
    follow(likely, likely=40)
    likely.step()
    assert told[-1]["total"] == 40 + 10


class Terminal(io.StringIO):
    """Standard error of a user."""

    def isatty(self) -> bool:
        return True


COUNTS = {"written": 50, "total": 200, "ended": 1, "requests": 4}


def test_a_user_sees_both_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bars = ProgressBars(2)
    with bars.run("dense") as tell:
        tell(COUNTS)
        tell(COUNTS | {"written": 200})
    with bars.run("twins") as tell:
        tell(COUNTS)
        for bar in list(progress.tqdm._instances):
            bar.refresh()
        shown = terminal.getvalue()
    assert "dense (1 of 2): starting the engine" in shown
    assert "twins (2 of 2)" in shown
    assert "50/200 tokens" in shown
    assert "1 of 4 texts" in shown
    assert " 62%" in shown, "one of two runs, and a quarter of the other"
    assert " left" in shown
    assert not progress.tqdm._instances, "nothing stays on the screen"


def test_bars_move_while_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_TICK", 0.01)
    with ProgressBars(1).run("dense"):
        end = time.monotonic() + 20
        while terminal.getvalue().count("starting the engine") < 4:
            assert time.monotonic() < end, "drawn once, and frozen"
            time.sleep(0.01)


def test_a_log_gets_lines_instead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    caplog.set_level(logging.INFO, "memshare")
    bars = ProgressBars(2)
    with bars.run("dense") as tell:
        tell(COUNTS)
        for written in (100, 150, 200):
            tell(COUNTS | {"written": written})
    assert capsys.readouterr().err == ""
    [line, *_] = caplog.messages
    assert line.startswith("dense (1 of 2): 150 of 200 tokens, 1 of 4 texts, 00:")
    assert "all runs: " in line
    assert "?" not in line


def test_a_run_that_fails_takes_its_bars_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyboardInterrupt), ProgressBars(2).run("dense"):
        raise KeyboardInterrupt
    assert not progress.tqdm._instances


def test_more_work_takes_longer() -> None:
    speed = Speed(weights_s=0.02, layers=30, weight_bytes=3e8, kv_token_s=1e-6)
    base = {"model": "m", "dtype": "float32", "runs": 1, "steps": 1000, "batch": 1, "context": 500}

    def seconds(**more: Any) -> float:
        return speed.seconds(Work(**base | more))

    assert seconds(runs=5) == pytest.approx(5 * seconds())
    assert seconds(steps=2000) - seconds() > 20
    assert seconds(batch=100) - seconds() == pytest.approx(99 * 500 * 1e-6 * 1000)
    assert seconds(compared=1000) > seconds()


@pytest.mark.parametrize(
    ("seconds", "said", "warns"),
    [
        (None, "the bar will tell", False),
        (3, "About 10 seconds", False),
        (70, "About 70 seconds", False),
        (599, "About 10 minutes", False),
        (800, "About 13 minutes", True),
        (7200, "About 2.0 hours", True),
    ],
)
def test_long_work_is_said_to_be_long(seconds: float | None, said: str, warns: bool) -> None:
    words = in_words(seconds, "fewer --arms make it shorter")
    assert said in words
    assert ("more than 10 minutes; fewer --arms make it shorter." in words) == warns


def test_a_model_of_unknown_shape_has_no_estimate(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    assert estimate(Work(str(tmp_path), "float32", 1, 1, 1, 1)) is None


def test_a_probe_measures_a_model_of_this_shape(tmp_path: Any) -> None:
    from transformers import LlamaConfig

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    for layers in (2, 400):
        LlamaConfig(**shape, num_hidden_layers=layers, vocab_size=256).save_pretrained(
            tmp_path / str(layers)
        )
    few, many = (
        Speed(**measure(asdict(Work(str(tmp_path / str(layers)), "float32", 1, 1000, 1, 10))))
        for layers in (2, 400)
    )
    assert 0 < few.weights_s < many.weights_s
    assert many.kv_token_s > few.kv_token_s > 0
    assert many.weight_bytes > few.weight_bytes == 4 * (2 * (4 * 64 * 64 + 3 * 64 * 128) + 256 * 64)
