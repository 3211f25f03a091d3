"""The requests that MemShare follows, and what of each may be touched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from memshare.config import MemShareConfig, ProtectConfig
from memshare.core.capacity import end_target, first_target
from memshare.core.requests import Candidate, Entry, RequestState
from memshare.engine.vllm_0_32.block_tables import BlockTables
from memshare.mechanisms.remap.policy import BlockRef
from memshare.request_options import RequestOptions, RequestOptionsError, parse_request_options
from memshare.search.steps import DelimiterAutomaton, StepSegmenter

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_ALL_OF_THE_PROMPT = ProtectConfig(prompt_tokens="all")


class RequestTracker:
    """Live requests by id, with their limits: protected prompt, recent window, budget."""

    def __init__(
        self,
        config: MemShareConfig,
        automaton: DelimiterAutomaton | None,
        tables: BlockTables,
    ) -> None:
        self._config = config
        self._automaton = automaton
        self._tables = tables
        self._states: dict[str, RequestState] = {}

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._states.values())

    def get(self, request_id: str) -> RequestState | None:
        """The request's state; None if it is not followed."""
        return self._states.get(request_id)

    def add(self, request: Request) -> str | None:
        """Follow a request, or say (as a metric label) why it must stay exact."""
        options, reason = _options_of(request)
        if reason is None:
            self._states[request.request_id] = RequestState(
                request, options, self._history_of(request), self._new_segmenter()
            )
        return reason

    def remove(self, request_id: str) -> RequestState | None:
        """Stop following a request."""
        state = self._states.pop(request_id, None)
        if state is not None:
            state.alive = False
        return state

    def start_generation(self, state: RequestState) -> None:
        """The request has lost its blocks."""
        state.start_generation(self._new_segmenter())

    def entry(self, ref: BlockRef) -> Entry | None:
        """The table entry that a proposal means; None if it holds no full block of its own now.

        A re-pointed entry is neither target nor donor: its block holds another position's KV.
        """
        state = self._states.get(ref.span.request_id)
        if state is None or state.generation != ref.span.generation or ref.index >= state.full:
            return None
        if ref.index in state.repointed:
            return None
        table = self._tables.table(state.request_id)
        if table is None or ref.index >= len(table):
            return None
        return Entry(state, state.generation, ref.index, table[ref.index])

    def is_current(self, pair: Candidate) -> bool:
        """Whether both blocks still are what they were when the pair was proposed."""
        return all(
            entry.is_current(self._tables.table(entry.state.request_id))
            for entry in (pair.target, pair.donor)
        )

    def first_target(self, state: RequestState) -> int:
        """First block behind the protected prompt."""
        request = state.request
        # Placeholders of images and embeddings hide what a block holds: all of the prompt stays.
        opaque = request.mm_features or request.prompt_embeds is not None
        protect = _ALL_OF_THE_PROMPT if opaque else self._config.protect
        return first_target(request.num_prompt_tokens, self._tables.token_map, protect)

    def end_target(self, state: RequestState) -> int:
        """One past the last block before the recent window."""
        return self._end_target(state.full)

    def budget(self, state: RequestState) -> int:
        """How many of the request's blocks may be re-pointed in all."""
        return self._budget(state, state.full)

    def shareable(self, state: RequestState, full: int) -> int:
        """How many blocks could be re-pointed once the request has so many full ones."""
        targets = max(0, self._end_target(full) - self.first_target(state))
        return min(self._budget(state, full), targets)

    def _end_target(self, full: int) -> int:
        return end_target(full, self._tables.token_map, self._config.protect)

    def _budget(self, state: RequestState, full: int) -> int:
        fraction = self._config.budget.max_shared_fraction
        asked = state.options.memshare_max_shared_fraction
        if asked is not None:
            fraction = min(fraction, asked)
        return int(fraction * full)

    def _history_of(self, request: Request) -> str:
        if self._config.scope == "request":
            return str(request.request_id)
        adapter = request.lora_request.lora_int_id if request.lora_request is not None else 0
        return f"tenant\0{request.cache_salt or ''}\0{adapter}"

    def _new_segmenter(self) -> StepSegmenter | None:
        if self._automaton is None:
            return None
        steps = self._config.steps
        return StepSegmenter(self._automaton, steps.min_tokens, steps.max_tokens)


def _options_of(request: Request) -> tuple[RequestOptions, str | None]:
    """The request's options, and why it must stay exact (a metric label) or None."""
    params = request.sampling_params
    if params is None:
        return RequestOptions(), "pooling"
    try:
        options = parse_request_options(params.extra_args)
    except RequestOptionsError as error:
        # The engine must not fall over one bad request: serve it, exactly.
        name = request.request_id
        logger.warning("request %s is served exactly: %s", name, error, extra={"request": name})
        return RequestOptions(), "invalid_options"
    if not options.enabled:
        return options, "requested"
    if params.prompt_logprobs is not None:
        return options, "prompt_logprobs"
    if request.resumable:
        return options, "resumable"  # its prompt grows, so no token of it is settled
    return options, None
