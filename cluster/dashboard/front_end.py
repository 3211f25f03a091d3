"""How the page sees the requests in vLLM's front end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestState

from cluster.dashboard.engine_sampler import EngineSampler
from cluster.guard.guard import GuardState


class _FrontEndRequest:
    """A request of vLLM's front end: a :class:`~cluster.dashboard.engine_sampler.LiveRequest`."""

    def __init__(self, state: RequestState) -> None:
        self._state = state

    @property
    def prompt(self) -> Sequence[int]:
        return self._state.prompt_token_ids or ()

    @property
    def output(self) -> Sequence[int]:
        detokenizer = self._state.detokenizer
        return detokenizer.output_token_ids if detokenizer is not None else ()


def watch_engine(
    engine: AsyncLLM,
    replica: str,
    node: str,
    show_text: bool,
    guard: Callable[[], GuardState] | None,
) -> EngineSampler:
    """What the page knows of this engine and its guard, as samples and traces."""
    requests = engine.output_processor.request_states
    # A copy: it is used in another thread, and tokenizers don't bear two at a time.
    tokenizer = copy.deepcopy(engine.get_tokenizer()) if show_text else None
    cache = engine.vllm_config.cache_config

    def find(request: str) -> _FrontEndRequest | None:
        state = requests.get(request)
        return None if state is None else _FrontEndRequest(state)

    return EngineSampler(
        replica,
        node,
        blocks=cache.num_gpu_blocks or 0,
        block_size=cache.block_size,
        find=find,
        unfinished=engine.output_processor.get_num_unfinished_requests,
        decode=(lambda tokens: str(tokenizer.decode(list(tokens)))) if tokenizer else None,
        guard=guard,
    )
