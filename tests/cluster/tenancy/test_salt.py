"""Every form of a prompt gets the tenant's salt, and no other (cluster/tenancy/salt.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.tenancy.salt import brings_salt, salted

LEAVES = st.one_of(
    st.fixed_dictionaries({"prompt": st.text()}),
    st.fixed_dictionaries({"prompt_token_ids": st.lists(st.integers(0, 9))}),
    st.fixed_dictionaries({"type": st.just("token"), "prompt_token_ids": st.lists(st.integers())}),
    st.text(),
    st.lists(st.integers(0, 9)),
)
PROMPTS = LEAVES | st.fixed_dictionaries(
    {"type": st.just("enc_dec"), "encoder_prompt": LEAVES, "decoder_prompt": LEAVES | st.none()}
)


def salts(prompt: object) -> list[object]:
    """Of all parts that hold tokens."""
    assert isinstance(prompt, dict)
    nested = [prompt[n] for n in ("encoder_prompt", "decoder_prompt") if prompt.get(n) is not None]
    return [s for part in nested for s in salts(part)] if nested else [prompt["cache_salt"]]


@given(PROMPTS)
def test_every_part_is_salted_and_the_original_is_not(prompt: object) -> None:
    own = salted(prompt, "s")
    assert set(salts(own)) == {"s"}
    assert brings_salt(own)
    assert not brings_salt(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "a", "cache_salt": "mine"},
        {"prompt": "a", "cache_salt": ""},
        {"encoder_prompt": {"prompt": "a", "cache_salt": "mine"}, "decoder_prompt": None},
        {"encoder_prompt": "a", "decoder_prompt": {"prompt": "a", "cache_salt": "mine"}},
    ],
)
def test_a_client_s_salt_is_seen(prompt: object) -> None:
    assert brings_salt(prompt)


async def test_what_cannot_be_salted_is_refused() -> None:
    async def stream() -> AsyncIterator[str]:
        yield "a"

    for prompt in (stream(), None, 3, object()):
        with pytest.raises(TypeError, match="is not served"):
            salted(prompt, "s")
