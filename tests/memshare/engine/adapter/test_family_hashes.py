"""Block hashes of a family, by vLLM's own hashing: who may find whose blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from memshare.engine.adapter import vllm_adapter

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

BLOCK = 4

keys = st.sampled_from(["key-of-one", "key-of-another"])
names = st.sampled_from(["plan", "act", "reflect"])
salts = st.sampled_from([None, "tenant-1", "tenant-2"])
texts = st.lists(st.integers(0, 3), min_size=BLOCK, max_size=6 * BLOCK)


@pytest.fixture(scope="module")
def hasher() -> Callable[..., Any]:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    hashing = get_hash_fn_by_name("sha256")
    init_none_hash(hashing)
    return get_request_block_hasher(BLOCK, hashing)


def ask(
    hasher: Callable[..., Any],
    text: list[int],
    name: str | None = None,
    salt: str | None = None,
    key: str | None = None,
) -> Any:
    """A request; of a family if a key is given."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    from memshare.engine.vllm_0_32.family_hashes import family_hasher

    params = SamplingParams(max_tokens=500)
    params.update_from_generation_config({}, eos_token_id=None)
    lora = LoRARequest(name, 1, f"/adapters/{name}") if name is not None else None
    if key is not None:
        hasher = family_hasher(hasher, key, lambda asked: None)
    return Request("r", text, params, None, lora_request=lora, cache_salt=salt, block_hasher=hasher)


@given(text=texts, name=names, other=names, salt=salts, key=keys)
def test_whole_blocks_are_found_within_a_family(
    hasher: Callable[..., Any], text: list[int], name: str, other: str, salt: str | None, key: str
) -> None:
    first = ask(hasher, text, name, salt, key)
    assert len(first.block_hashes) == len(text) // BLOCK
    assert ask(hasher, text, other, salt, key).block_hashes == first.block_hashes
    longer = ask(hasher, [*text, 1, 2, 3, 0, 1], other, salt, key).block_hashes
    assert longer[: len(first.block_hashes)] == first.block_hashes
    assert first.lora_request.lora_name == name, "the request keeps its adapter"


@given(text=texts, output=st.lists(st.integers(0, 3), max_size=9), name=names, key=keys)
def test_output_is_hashed_as_it_grows(
    hasher: Callable[..., Any], text: list[int], output: list[int], name: str, key: str
) -> None:
    grown = ask(hasher, text, name, None, key)
    for token in output:
        grown.append_output_token_ids(token)
    assert grown.block_hashes == ask(hasher, [*text, *output], name, None, key).block_hashes


@given(text=texts, one=st.tuples(names, salts, keys), another=st.tuples(names, salts, keys))
def test_nothing_is_found_across_families_and_salts(
    hasher: Callable[..., Any],
    text: list[int],
    one: tuple[str, str | None, str],
    another: tuple[str, str | None, str],
) -> None:
    ours = set(ask(hasher, text, *one).block_hashes)
    theirs = set(ask(hasher, text, *another).block_hashes)
    assert bool(ours & theirs) == (one[1:] == another[1:])


@given(text=texts, name=names, salt=salts, key=keys)
def test_nobody_outside_of_a_family_finds_its_blocks(
    hasher: Callable[..., Any], text: list[int], name: str, salt: str | None, key: str
) -> None:
    """Not the base model, and no adapter that has not joined, whatever it is called."""
    ours = set(ask(hasher, text, name, salt, key).block_hashes)
    for stranger in (None, name, key, "memshare-family"):
        assert ours.isdisjoint(ask(hasher, text, stranger, salt).block_hashes)


@given(text=texts, salt=salts, key=keys)
def test_the_base_models_blocks_are_hashed_as_ever(
    hasher: Callable[..., Any], text: list[int], salt: str | None, key: str
) -> None:
    """Also by the hasher of an engine that serves a family."""
    ours = ask(hasher, text, None, salt, key).block_hashes
    assert ours == ask(hasher, text, None, salt).block_hashes


def test_the_core_makes_one_such_hasher(hasher: Callable[..., Any]) -> None:
    """The next engine of this process gets vLLM's own, whether it shares or not."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.engine import core

    make, asked = core.get_request_block_hasher, []
    vllm_adapter().hash_by_family("key", asked.append)
    hashing = get_hash_fn_by_name("sha256")
    ours: Any = core.get_request_block_hasher(BLOCK, hashing)
    assert core.get_request_block_hasher is make
    text = [1] * BLOCK
    assert ask(ours, text, "plan").block_hashes == ask(hasher, text, "act", key="key").block_hashes
    assert [lora.lora_name for lora in asked] == ["plan"]


def test_what_is_not_admitted_becomes_no_request(hasher: Callable[..., Any]) -> None:
    from memshare.engine.vllm_0_32.family_hashes import family_hasher

    def refuse(asked: Any) -> None:
        raise ValueError(f"no {asked.lora_name}")

    with pytest.raises(ValueError, match="no plan"):
        ask(family_hasher(hasher, "key", refuse), [1] * BLOCK, "plan")
