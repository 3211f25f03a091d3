"""Prompts whose KV blocks are a tenant's own.

vLLM hashes a prompt's ``cache_salt`` into its first block, and each block into the next: prompts
with different salts share no block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_NESTED = ("encoder_prompt", "decoder_prompt")


def brings_salt(prompt: object) -> bool:
    """Whether a client has put a salt on a prompt."""
    return any(part.get("cache_salt") is not None for part in _parts(prompt))


def salted(prompt: object, salt: str) -> dict[str, object]:
    """A copy of a prompt with a salt.

    Args:
        prompt: in any form that vLLM's engine client takes, but for requests that are made already
            and prompts that arrive bit by bit, which no front end of ours uses.
        salt: the tenant's.

    Raises:
        TypeError: the prompt has another form, so that it can't be salted.
    """
    if isinstance(prompt, str):
        return {"prompt": prompt, "cache_salt": salt}
    if isinstance(prompt, list):
        return {"prompt_token_ids": prompt, "cache_salt": salt}
    if not isinstance(prompt, Mapping):
        raise TypeError(f"a prompt of type {type(prompt).__name__} is not served")
    nested = {name: salted(prompt[name], salt) for name in _NESTED if prompt.get(name) is not None}
    return {**prompt, **nested} if nested else {**prompt, "cache_salt": salt}


def _parts(prompt: object) -> Iterator[Mapping[object, object]]:
    if isinstance(prompt, Mapping):
        yield prompt
        for name in _NESTED:
            yield from _parts(prompt.get(name))
