"""Which requests may be compared with each other (memshare/core/request_tracker.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.config import load_config
from memshare.core.request_tracker import RequestTracker
from memshare.core.token_map import TokenMap


def history(scope: str, name: str, salt: str | None, adapter: int | None) -> str:
    """Key under which the steps of a request are compared."""
    config = load_config({"scope": scope, "policy": {"name": "paper"}}, environ={})
    tables: Any = SimpleNamespace(token_map=TokenMap(32))
    lora = None if adapter is None else SimpleNamespace(lora_int_id=adapter)
    request: Any = SimpleNamespace(
        request_id=name,
        cache_salt=salt,
        lora_request=lora,
        sampling_params=SimpleNamespace(extra_args=None, prompt_logprobs=None),
        resumable=False,
    )
    tracker = RequestTracker(config, tables)
    assert tracker.follow(request) is None
    state = tracker.get(name)
    assert state is not None
    return state.history


@pytest.mark.parametrize(("finer", "first"), [(False, 1), (True, 4)])
def test_all_of_the_prompt_stays_where_its_end_may_be_published_again(
    finer: bool, first: int
) -> None:
    tables: Any = SimpleNamespace(token_map=TokenMap(32), publishes_prompt_end=finer)
    tracker = RequestTracker(load_config({"protect": {"prompt_tokens": 20}}, environ={}), tables)
    request = SimpleNamespace(mm_features=(), prompt_embeds=None, num_prompt_tokens=100)
    state: Any = SimpleNamespace(request=request)
    assert tracker.first_target(state) == first


SALTS = (
    st.none() | st.text(min_size=1, max_size=4) | st.sampled_from(["a", "a\0", "\0001", "a\0001"])
)
ADAPTERS = st.none() | st.integers(1, 12)


@given(SALTS, ADAPTERS, SALTS, ADAPTERS)
def test_tenants_and_adapters_have_histories_of_their_own(
    salt: str | None, adapter: int | None, other_salt: str | None, other_adapter: int | None
) -> None:
    same = (salt, adapter) == (other_salt, other_adapter)
    mine, theirs = (
        history("tenant", "a", salt, adapter),
        history("tenant", "b", other_salt, other_adapter),
    )
    assert (mine == theirs) is same


@pytest.mark.parametrize("salt", [None, "a"])
def test_by_default_a_request_is_compared_with_itself_alone(salt: str | None) -> None:
    assert history("request", "a", salt, None) != history("request", "b", salt, None)
