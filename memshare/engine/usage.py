"""What a request cost in KV memory, returned with its last output if it has asked for it.

vLLM hands what a connector returns when a request finishes to the request's last output
(``RequestOutput.kv_transfer_params``), and from there to the reply of its HTTP server. A request
that is ended from outside the engine, by a stop string or an abort, has no such output.
"""

from __future__ import annotations

from typing import TypedDict

from memshare.core.interfaces import EngineRequest
from memshare.core.requests import RequestState
from memshare.request_options import USAGE


class RequestUsage(TypedDict):
    """What one request cost."""

    blocks_shared: int
    """KV blocks it gave up in its life, by remaps or by compaction. If this and ``tokens_shared``
    are 0, its output is vLLM's own."""
    tokens_dropped: int
    """Tokens that compaction dropped in its life, as many in every layer and KV head."""
    peak_kv_blocks: int
    """Most KV blocks it held at one time. Those of a prefix that others use, too, count; donors
    that belong to others don't. A preemption in the middle of a block may hide that one block."""
    preemptions: int
    """How often it lost its blocks."""
    tokens_shared: int
    """Tokens that it found in blocks of other adapters of its family (``agents``), and did not
    compute; again each time that it came back from a preemption."""


class ReturnedUsage(TypedDict):
    """The form in which it is returned."""

    memshare: RequestUsage


def returned_usage(
    request: EngineRequest, state: RequestState | None, entries: int, tokens_shared: int = 0
) -> ReturnedUsage | None:
    """The usage of a request that ends now.

    Args:
        request: vLLM's own object.
        state: ours; None if the request was not followed, as it had to stay exact.
        entries: of its block table.
        tokens_shared: that it found in blocks of other adapters.

    Returns:
        None if it has not asked.
    """
    params = request.sampling_params
    if params is None or (params.extra_args or {}).get(USAGE) != "on":
        return None
    given_up, dropped, peak = 0, 0, entries
    if state is not None:
        given_up, dropped = state.given_up, state.dropped_tokens
        peak = max(state.peak_blocks, entries - state.lost)
    preemptions = int(request.num_preemptions)
    return {
        "memshare": {
            "blocks_shared": given_up,
            "tokens_dropped": dropped,
            "peak_kv_blocks": peak,
            "preemptions": preemptions,
            "tokens_shared": tokens_shared,
        }
    }
