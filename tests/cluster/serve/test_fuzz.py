"""Every operation of the HTTP API, with requests that its schema allows and that it does not."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable

import httpx
import pytest
import requests
import schemathesis
from schemathesis import GenerationMode

from tests.cluster.support.bad_input import FUZZ_S, GOOD, KNOWN, NOT_TRIED, bound_tokens, fuzz
from tests.fuzzing import TIMES
from tools.bench.local_cluster import Server

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.complete]


def test_bad_input_is_never_an_error_of_the_server(server: Server) -> None:
    """Requests are bounded in tokens, as this is about their form. An answer of 5xx, or none,
    fails."""
    schema = schemathesis.openapi.from_dict(
        httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    )
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions"} <= {op.path for op in operations}
    tried = [op for op in operations if op.path not in NOT_TRIED]
    assert len(operations) - len(tried) == len(NOT_TRIED)
    answers: Counter[int] = Counter()
    failures: list[str] = []

    def judge(label: str, path: str, body: object, ask: Callable[[], int]) -> None:
        try:
            status = ask()
        except (requests.RequestException, httpx.HTTPError) as error:
            failures.append(f"{label}: {error!r}: {body!r}")
            return
        answers[status] += 1
        if status >= 500 and (path, status) not in KNOWN:
            failures.append(f"{label}: {status}: {body!r}")

    def post(path: str, body: object) -> int:
        content = json.dumps(body)  # httpx would refuse to encode what we want to be refused
        headers = {"Content-Type": "application/json"}
        url = f"{server.url}{path}"
        return httpx.post(url, content=content, headers=headers, timeout=300).status_code

    def call(case: schemathesis.Case) -> None:
        label, path = case.operation.label, case.operation.path
        bound_tokens(case.body)
        where = {"base_url": server.url, "timeout": 60}
        judge(label, path, case.body, lambda: case.call(**where).status_code)
        if path in GOOD and isinstance(case.body, dict):
            for name in [n for n in case.body if n not in GOOD[path]][:2]:
                body = GOOD[path] | {name: case.body[name]}
                judge(label, path, body, lambda b=body: post(path, b))

    for operation in tried:
        end = time.monotonic() + FUZZ_S * TIMES / len(tried)
        for mode in GenerationMode:
            fuzz(operation.as_strategy(generation_mode=mode), call, end)
    print(f"\nanswers by status: {dict(sorted(answers.items()))}")
    assert failures == []
    assert answers[200] > 0, "some requests are good"
    assert answers[400] > 0, "and some are bad"
    assert server.completes()
