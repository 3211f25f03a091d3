"""Block hashes under a family's key instead of an adapter's name.

vLLM puts an adapter's name and path into the hashes of its requests' blocks. A request of a family
is shown to vLLM's own hasher with another name there; tokens, salt and all else stay the request's.

vLLM hashes a prompt when the request arrives, on the thread that reads requests and beside the
forward pass. What is raised there ends that request alone, with an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vllm.v1.engine import core

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    Hasher = Callable[[Request], list[BlockHash]]


@dataclass(frozen=True, slots=True)
class _FamilyName:
    """Stands in for a LoRA request, as far as hashes go."""

    lora_path: str
    lora_name: str = "memshare-family"


class _InFamily:
    """A request, but for its adapter's name."""

    def __init__(self, request: Request, name: _FamilyName) -> None:
        self._request = request
        self.lora_request = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


@dataclass(frozen=True, slots=True)
class FamilyHasher:
    """vLLM's block hasher, for the adapters of a family; the base model's requests stay by
    themselves. Holds no request, so that none holds itself.

    Attributes:
        hasher: vLLM's own.
        name: that members' blocks are hashed under.
        admit: see :meth:`Adapter.hash_by_family`.
    """

    hasher: Hasher
    name: _FamilyName
    admit: Callable[[LoRARequest], None]

    def __call__(self, request: Request) -> list[BlockHash]:
        lora = request.lora_request
        if lora is None:
            return self.hasher(request)
        self.admit(lora)
        return self.hasher(cast("Request", _InFamily(request, self.name)))


def family_hasher(hasher: Hasher, key: str, admit: Callable[[LoRARequest], None]) -> FamilyHasher:
    """A hasher that takes ``key`` for the name of every adapter that ``admit`` lets pass."""
    return FamilyHasher(hasher, _FamilyName(key), admit)


def hash_by_family(key: str, admit: Callable[[LoRARequest], None]) -> None:
    """See :meth:`Adapter.hash_by_family`.

    vLLM's core gives nobody its hasher, and makes it once, by a function that it has imported. That
    function is replaced for this one call.
    """
    unchecked: Any = core
    make = unchecked.get_request_block_hasher

    def make_once(hash_block_size: int, hash_function: Callable[[Any], bytes]) -> FamilyHasher:
        unchecked.get_request_block_hasher = make
        return family_hasher(make(hash_block_size, hash_function), key, admit)

    unchecked.get_request_block_hasher = make_once
