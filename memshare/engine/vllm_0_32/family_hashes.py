"""Block hashes under a family's key instead of an adapter's name.

vLLM puts an adapter's name and path into the hashes of its requests' blocks. A request of a family
is shown to vLLM's own hasher with another name there; tokens, salt and all else stay the request's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request


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
class _FamilyHasher:
    """vLLM's block hasher, for one family. Holds no request, so that none holds itself."""

    hasher: Callable[[Request], list[BlockHash]]
    name: _FamilyName

    def __call__(self, request: Request) -> list[BlockHash]:
        return self.hasher(cast("Request", _InFamily(request, self.name)))


def join_family(request: Request, key: str) -> None:
    """See :meth:`Adapter.join_family`."""
    if request._block_hasher is None:
        return  # nothing is cached
    request._block_hasher = _FamilyHasher(request._block_hasher, _FamilyName(key))
    request.block_hashes.clear()
    request.update_block_hashes()
