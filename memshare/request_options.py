"""What one request may ask of MemShare, through vLLM's ``vllm_xargs``.

Keys: ``memshare`` ("on" or "off"), ``memshare_step_threshold``, ``memshare_block_threshold`` and
``memshare_max_shared_fraction`` (numbers in 0..1), ``memshare_max_kept_tokens`` (a whole number),
``memshare_usage`` ("on" or "off"). They can only restrict or tune what the server's configuration
allows; ``memshare: on`` does not switch on a server in mode ``observe`` or ``off``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memshare.config import Fraction

_PREFIX = "memshare"
USAGE = "memshare_usage"
"""The option that asks for the request's usage with its last output."""


class RequestOptionsError(ValueError):
    """A request asks for something that does not exist. Names the field, its value and the fix."""


class RequestOptions(BaseModel):
    """Per-request control; None keeps the server's value."""

    # Strict: text is no number. (That `true` is none is said by the types.)
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    memshare: Literal["on", "off"] = "on"
    """``off`` keeps this request's KV exact and never uses it as a donor."""
    memshare_step_threshold: Fraction | None = None
    """Cosine of two steps' token bags at or above which they are compared, 0..1."""
    memshare_block_threshold: Fraction | None = None
    """Similarity of two blocks at or above which one may stand in for the other, 0..1; with policy
    ``twins``, the coverage below which a block is never a target."""
    memshare_max_shared_fraction: Fraction | None = None
    """Fraction of this request's blocks that may be given up, 0..1: re-pointed or, with policy
    ``compaction``, freed by dropping tokens. At most the server's."""
    memshare_max_kept_tokens: Annotated[int, Field(ge=1)] | None = None
    """KV tokens that this request keeps, 1 or more, where the server has a budget of tokens: the
    server's if that is more, and nothing where it has none."""
    memshare_usage: Literal["on", "off"] = "off"
    """``on`` returns what the request cost in KV memory with its last output, in
    ``kv_transfer_params``."""

    @property
    def enabled(self) -> bool:
        """Whether blocks of this request may be shared at all."""
        return self.memshare == "on"


_DEFAULTS = RequestOptions()


def parse_request_options(extra_args: Mapping[str, object] | None) -> RequestOptions:
    """Read our options from a request's extra arguments; other keys are left alone.

    Raises:
        RequestOptionsError: a ``memshare*`` key is unknown or its value is not valid.
    """
    ours = {k: v for k, v in (extra_args or {}).items() if k.startswith(_PREFIX)}
    if not ours:
        return _DEFAULTS
    try:
        return RequestOptions.model_validate(ours)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = str(item["loc"][0])
            if item["type"] == "extra_forbidden":
                known = ", ".join(RequestOptions.model_fields)
                lines.append(f"vllm_xargs.{name}: there is no such option; known: {known}")
            else:
                fix = " ".join((RequestOptions.model_fields[name].description or "").split())
                lines.append(f"vllm_xargs.{name} = {item['input']!r}: {item['msg']}; {fix}")
        raise RequestOptionsError("\n".join(lines)) from None
