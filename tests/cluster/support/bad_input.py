"""Requests that a schema allows, and that it does not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from tests.fuzzing import TIMES

# Left out by name: it changes the engine of all tests here, and is for operators anyway.
NOT_TRIED = {"/scale_elastic_ep"}
# Answers of 5xx that are none to bad input (docs/limits.md).
KNOWN = {("/v1/systemone", 501)}
FUZZ_S = 30.0
# Good requests: with one field of a generated request each, they come further than that request.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "smollm2", "prompt": "Once", "max_tokens": 2},
    "/v1/chat/completions": {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 2,
    },
    "/v1/responses": {"model": "smollm2", "input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 2,
    },
    "/tokenize": {"prompt": "Hello"},
}


def bound_tokens(body: Any) -> None:
    """Keep a request short; what is no number stays as it is."""
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_output_tokens"):  # each is unknown to some operations
        if body.get(name) is None:
            body[name] = 2
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int) and 4 < body[name] < 10_000:
            body[name] = 4


class TimeUpError(Exception):
    """Ends a search: making the next case may take seconds, too."""


def fuzz(
    cases: st.SearchStrategy[schemathesis.Case],
    call: Callable[[schemathesis.Case], None],
    end: float,
) -> None:
    """Call with a few cases, but not after ``end``."""

    @given(cases)
    @settings(
        max_examples=10 * TIMES,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # each case is judged by itself: nothing to shrink
        suppress_health_check=list(HealthCheck),
    )
    def run(case: schemathesis.Case) -> None:
        if time.monotonic() > end:
            raise TimeUpError
        call(case)

    # What takes no input has no wrong one.
    with contextlib.suppress(TimeUpError, Unsatisfiable):
        run()
