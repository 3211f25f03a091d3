"""Stage one as a service: histories, forgetting, and answers that are not trusted."""

from __future__ import annotations

import pickle
import tomllib
from collections.abc import Sequence
from importlib import invalidate_caches
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.config import EvaluatorConfig, StepConfig, load_config
from memshare.search.evaluate import (
    SOURCES,
    EvaluatorAnswer,
    EvaluatorError,
    InProcessSource,
    LexicalEvaluator,
    NewSteps,
    Span,
    StepMatch,
    open_source,
)

ROOT = Path(__file__).resolve().parents[3]


def new_steps(
    request: str,
    position: int,
    *steps: Sequence[int],
    history: str | None = None,
    generation: int = 0,
    threshold: float = 0.9,
    sent_at: float = 1.0,
) -> NewSteps:
    """Steps that ``request`` has finished, the first of them at ``position``."""
    tokens = [token for step in steps for token in step]
    bounds = [0]
    for step in steps:
        bounds.append(bounds[-1] + len(step))
    return NewSteps(
        request_id=request,
        generation=generation,
        history=request if history is None else history,
        position=position,
        tokens=tokens,
        bounds=tuple(bounds),
        threshold=threshold,
        sent_at=sent_at,
    )


def evaluator(max_requests: int = 8, **steps: int) -> LexicalEvaluator:
    return LexicalEvaluator(StepConfig(**steps), max_requests)


def similar(a: Sequence[int], b: Sequence[int]) -> float:
    x, y = (np.bincount(step, minlength=8).astype(float) for step in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


# Batches of (request, its steps); the request's number says which tenant it belongs to.
BATCHES = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=3),
        ),
        max_size=3,
    ),
    max_size=6,
)


@given(BATCHES, st.booleans())
def test_every_step_is_compared_with_all_earlier_ones_of_its_history(
    batches: list[list[tuple[int, list[list[int]]]]], shared: bool
) -> None:
    subject = evaluator(max_matches=64)
    seen: list[tuple[str, Span, list[int]]] = []
    written = [0, 0, 0, 0]
    for batch in batches:
        sent, expected = [], []
        for request, steps in batch:
            name, history = f"r{request}", f"t{request % 2}" if shared else f"r{request}"
            sent.append(new_steps(name, written[request], *steps, history=history))
            for step in steps:
                span = Span(name, 0, written[request], written[request] + len(step))
                written[request] = span.end
                expected += [
                    (span, earlier)
                    for where, earlier, old in seen
                    if where == history and similar(step, old) >= 0.9 - 1e-6  # as 9 / 10 may round
                ]
                seen.append((history, span, step))
        answer = subject.evaluate(sent)
        assert EvaluatorAnswer.is_sound(answer)
        found = [(match.later, match.earlier) for match in answer.matches]
        assert sorted(found) == sorted(expected)
        bags = {span: step for _, span, step in seen}
        for match in answer.matches:
            score = similar(bags[match.later], bags[match.earlier])
            assert match.similarity == pytest.approx(score, abs=1e-5)


def test_histories_do_not_mix() -> None:
    subject = evaluator()
    subject.evaluate([new_steps("a", 0, [1, 2, 3])])
    assert subject.evaluate([new_steps("b", 0, [1, 2, 3])]).matches == ()
    # Negative control: one tenant's requests do see each other.
    subject.evaluate([new_steps("c", 0, [1, 2, 3], history="t")])
    (match,) = subject.evaluate([new_steps("d", 9, [1, 2, 3], history="t")]).matches
    assert match[:2] == (Span("d", 0, 9, 12), Span("c", 0, 0, 3))
    assert match.similarity == pytest.approx(1.0)


def test_the_threshold_is_each_batch_s_own() -> None:
    subject = evaluator()
    subject.evaluate([new_steps("a", 0, [1, 1, 2])])
    assert subject.evaluate([new_steps("a", 3, [1, 2], threshold=0.95)]).matches == ()
    assert len(subject.evaluate([new_steps("a", 5, [1, 2], threshold=0.94)]).matches) == 2


def test_matches_are_limited_best_first() -> None:
    subject = evaluator(max_matches=2)
    subject.evaluate([new_steps("a", 0, [1, 2], [1, 2], [1, 1, 1, 2, 2], [3])])
    matches = subject.evaluate([new_steps("a", 10, [1, 2], threshold=0.5)]).matches
    assert [match.earlier.start for match in matches] == [2, 0]


def test_a_history_that_is_forgotten_is_gone() -> None:
    subject = evaluator()
    subject.evaluate([new_steps("a", 0, [1, 2]), new_steps("b", 0, [1, 2])])
    subject.forget_histories(["a", "never seen"], [])
    assert subject.evaluate([new_steps("a", 2, [1, 2])]).matches == ()
    assert len(subject.evaluate([new_steps("b", 2, [1, 2])]).matches) == 1


def test_a_request_is_forgotten_in_the_history_it_shares() -> None:
    subject = evaluator()
    for request in ("a", "b"):
        subject.evaluate([new_steps(request, 0, [1, 2], history="t")])
    subject.forget_histories([], ["a"])
    matches = subject.evaluate([new_steps("c", 0, [1, 2], history="t", threshold=0.0)]).matches
    assert [match.earlier.request_id for match in matches] == ["b"]


def test_the_least_recently_used_history_goes_first() -> None:
    subject = evaluator(max_requests=2)
    for request in ("a", "b", "a", "c"):
        subject.evaluate([new_steps(request, 0, [1, 2])])
    assert subject.evaluate([new_steps("b", 2, [1, 2])]).matches == (), "b had to make room"
    subject.evaluate([new_steps("c", 2, [1, 2])])
    assert len(subject.evaluate([new_steps("c", 4, [1, 2])]).matches) == 2
    assert len(list(subject._histories)) == 2


def test_an_answer_echoes_the_oldest_time() -> None:
    batch = [new_steps("a", 0, [1], sent_at=5.0), new_steps("b", 0, [1], sent_at=4.0)]
    assert evaluator().evaluate(batch).sent_at == 4.0
    assert evaluator().evaluate([]) == EvaluatorAnswer((), 0.0)


def test_what_is_sent_crosses_processes() -> None:
    sent = new_steps("a", 3, [1, 2], [3])
    back = pickle.loads(pickle.dumps(sent))
    assert back == sent
    subject = evaluator()
    subject.evaluate([sent])
    answer = pickle.loads(pickle.dumps(subject.evaluate([back])))
    assert EvaluatorAnswer.is_sound(answer)
    assert len(answer.matches) == 2


# ---- what is sound ----

LATER, EARLIER = Span("r", 0, 8, 12), Span("r", 0, 0, 4)
SOUND = StepMatch(LATER, EARLIER, 0.95)


def test_sound_answers_are_sound() -> None:
    assert EvaluatorAnswer.is_sound(EvaluatorAnswer((), 0.0))
    assert EvaluatorAnswer.is_sound(EvaluatorAnswer((SOUND, SOUND), 1.5))


UNSOUND: dict[str, Any] = {
    "nothing": None,
    "text": "answer",
    "a dictionary": {"matches": (), "sent_at": 0.0},
    "a list of matches": EvaluatorAnswer([SOUND], 0.0),  # type: ignore[arg-type]
    "no time": EvaluatorAnswer((SOUND,), None),  # type: ignore[arg-type]
    "a time of another type": EvaluatorAnswer((), "now"),  # type: ignore[arg-type]
    "a time that is no number": EvaluatorAnswer((SOUND,), float("nan")),
    "a similarity that is no number": EvaluatorAnswer(
        (SOUND._replace(similarity=float("nan")),), 0.0
    ),
    "a match that is a tuple": EvaluatorAnswer((tuple(SOUND),), 0.0),  # type: ignore[arg-type]
    "one bad match among good ones": EvaluatorAnswer((SOUND, None), 0.0),  # type: ignore[arg-type]
    "a span that is a tuple": EvaluatorAnswer((SOUND._replace(later=tuple(LATER)),), 0.0),
    "a similarity that is text": EvaluatorAnswer((SOUND._replace(similarity="0.9"),), 0.0),
    "a request that is no text": EvaluatorAnswer(
        (SOUND._replace(later=LATER._replace(request_id=7)),), 0.0
    ),
    "no generation": EvaluatorAnswer((SOUND._replace(later=LATER._replace(generation=None)),), 0.0),
    "a fractional start": EvaluatorAnswer(
        (SOUND._replace(earlier=EARLIER._replace(start=0.5)),), 0.0
    ),
    "a fractional end": EvaluatorAnswer((SOUND._replace(earlier=EARLIER._replace(end=4.0)),), 0.0),
    "a negative start": EvaluatorAnswer((SOUND._replace(earlier=EARLIER._replace(start=-1)),), 0.0),
    "an empty span": EvaluatorAnswer((SOUND._replace(later=LATER._replace(end=8)),), 0.0),
    "a span backwards": EvaluatorAnswer((SOUND._replace(later=LATER._replace(end=7)),), 0.0),
}


@pytest.mark.parametrize("thing", UNSOUND.values(), ids=UNSOUND)
def test_unsound_answers_are_seen(thing: object) -> None:
    assert EvaluatorAnswer.is_sound(thing) is False


# ---- sources ----


def test_the_source_in_process_answers_each_batch_once() -> None:
    source = open_source(load_config({"policy": {"name": "paper"}}, {}))
    assert isinstance(source, InProcessSource)
    assert source.pending == 0
    assert source.collect() == []
    source.submit([new_steps("a", 0, [1, 2])])
    source.submit([new_steps("a", 2, [1, 2])])
    assert source.pending == 2
    first, second = source.collect()
    assert isinstance(first, EvaluatorAnswer)
    assert isinstance(second, EvaluatorAnswer)
    assert [len(first.matches), len(second.matches)] == [0, 1]
    assert source.pending == 0
    assert source.collect() == []
    source.forget_histories(["a"], [])
    source.submit([new_steps("a", 4, [1, 2])])
    (answer,) = source.collect()
    assert isinstance(answer, EvaluatorAnswer)
    assert answer.matches == ()
    source.close()


def test_every_source_of_the_configuration_is_in_the_library_or_registered() -> None:
    names = get_args(EvaluatorConfig.model_fields["source"].annotation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    registered = project["entry-points"][SOURCES]
    assert set(names) == {"in_process", *registered}
    for name, value in registered.items():
        assert callable(EntryPoint(name, value, SOURCES).load())


def test_a_source_is_found_by_the_name_that_its_package_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "memshare-0.dist-info"  # in front of the installed one
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: memshare\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{SOURCES}]\nray = a_pool:Source\n")
    (tmp_path / "a_pool.py").write_text(
        "class Source:\n    def __init__(self, config): self.config = config\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config({"evaluator": {"source": "ray"}}, {})
    source: Any = open_source(config)
    assert type(source).__module__ == "a_pool"
    assert source.config is config
    (info / "entry_points.txt").write_text("")
    invalidate_caches()
    with pytest.raises(LookupError, match="'ray'; install memshare again, or set"):
        open_source(config)


def test_an_error_says_what_and_why() -> None:
    assert str(EvaluatorError("busy")) == "busy"
    assert str(EvaluatorError("dead", "actor 3")) == "dead: actor 3"
    assert EvaluatorError("dead", "actor 3").reason == "dead"
