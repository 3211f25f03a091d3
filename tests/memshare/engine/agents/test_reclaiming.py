"""Adapters with a cache of their own each, whose requests are compacted: what others read stays."""

from __future__ import annotations

from typing import Any

import pytest

from tests.memshare.engine.agents.served import (
    TIGHT,
    TOLERANCE,
    WRONG,
    Ask,
    Roles,
    Said,
    Served,
    peft_distance,
    words,
)
from tests.memshare.engine.harness import BLOCK, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

RECLAIMS: dict[str, Any] = {
    "mode": "share",
    "policy": {"name": "compaction", "scorer": "recency"},
    "integrity": {"check_every": 1, "on_failure": "raise"},
}


@pytest.mark.proves("lora")
def test_compaction_of_adapters_that_do_not_share(roles: Roles, start_engine: StartEngine) -> None:
    """One prompt per adapter, which several of its requests read while they are compacted: whoever
    lost nothing is what peft says, in the same batch, and so is who reads the prompt afterwards."""
    options = roles.options("nonshared") | RECLAIMS
    names = (None, "plan", "act", "reflect")
    prompts = {name: words(number, 2 * BLOCK + 1) for number, name in enumerate(names)}
    with start_engine(str(roles.base), options, **TIGHT) as engine:
        served = Served(engine, roles.apart)
        served.ask(*(Ask(prompt, name, tokens=1) for name, prompt in prompts.items()))
        crowd = [
            Ask([*prompts[name], *words(10 + number, 3)], name, tokens=150, exact=number % 5 == 0)
            for number, name in enumerate(names * 3)
        ]
        answers = served.ask(*crowd)
        again = [Ask(prompt, name, exact=True) for name, prompt in prompts.items()]
        read = served.ask(*again)
        assert engine.totals["compactions"] > 0
        assert engine.is_clean()

    def far(ask: Ask, said: Said) -> float:
        return peft_distance(roles, roles.apart, ask, said)

    lost = [said.usage["blocks_shared"] > 0 for said in answers]
    assert sum(lost) >= 3, "one of each"
    assert not any(gone for gone, ask in zip(lost, crowd, strict=True) if ask.exact)
    for gone, ask, said in zip(lost, crowd, answers, strict=True):
        if not gone:
            assert far(ask, said) < TOLERANCE
    assert max(far(*pair) for gone, *pair in zip(lost, crowd, answers, strict=True) if gone) > WRONG
    for ask, said in zip(again, read, strict=True):
        assert said.cached == 2 * BLOCK
        assert far(ask, said) < TOLERANCE
