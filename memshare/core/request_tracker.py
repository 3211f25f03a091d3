"""The requests that MemShare follows, and which of their blocks it may touch."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from memshare.config import MemShareConfig, ProtectConfig
from memshare.core.capacity import end_target, first_target
from memshare.core.interfaces import BlockTables, EngineRequest
from memshare.core.requests import RequestState
from memshare.request_options import RequestOptions, RequestOptionsError, parse_request_options

logger = logging.getLogger(__name__)

_ALL_OF_THE_PROMPT = ProtectConfig(prompt_tokens="all")


class RequestTracker:
    """Live requests by id, with their limits: protected prompt, recent window, budget.

    Attributes:
        step: the engine step that is being scheduled, counted from 1.
        exact: live requests that are not followed.
        unsent: live requests whose blocks no step has sent to the workers yet: beside another KV
            connector they may wait for it to fill them.
    """

    def __init__(self, config: MemShareConfig, tables: BlockTables) -> None:
        self.step = 0
        self.exact: set[str] = set()
        self.unsent: set[str] = set()
        self._config = config
        self._max_given_up = config.max_given_up
        self._max_thinning = config.max_thinning
        self._max_kept_tokens = config.budget.max_kept_tokens
        self._recent_tokens = config.recent_tokens
        self._tables = tables
        self._states: dict[str, RequestState] = {}

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._states.values())

    def __len__(self) -> int:
        return len(self._states)

    def get(self, request_id: str) -> RequestState | None:
        """The request's state; None if it is not followed."""
        return self._states.get(request_id)

    def follow(self, request: EngineRequest) -> str | None:
        """Follow a request, or say (as a metric label) why it must stay exact."""
        options, reason = _options_of(request)
        if reason is not None:
            self.exact.add(request.request_id)
        else:
            self._states[request.request_id] = RequestState(
                request, options, self._history_of(request)
            )
        return reason

    def unfollow(self, request_id: str) -> RequestState | None:
        """Stop following a request, if it was; it has ended."""
        self.exact.discard(request_id)
        self.unsent.discard(request_id)
        state = self._states.pop(request_id, None)
        if state is not None:
            state.alive = False
        return state

    def must_wait(self, state: RequestState) -> bool:
        """Whether nothing of this request's table may be changed before the next step.

        Either its whole block list is on its way to the workers and would overwrite the change, or
        it would be its first loss in a step that publishes a block: approximate KV would enter the
        prefix cache.
        """
        if self.in_transit(state):
            return True
        return state.tainted_from is None and self._tables.publishes_soon(state.request)

    def in_transit(self, state: RequestState) -> bool:
        """Whether the request holds no blocks, or its whole block list is on its way to the workers
        and would overwrite any change."""
        request_id = state.request_id
        if state.sent_whole_at == self.step or request_id in self.unsent:
            return True
        return self._tables.table(request_id) is None

    def first_target(self, state: RequestState) -> int:
        """First block behind the protected prompt."""
        request = state.request
        # Placeholders of images and embeddings hide what a block holds: all of the prompt stays. So
        # it does where the block at its end could be published after its loss.
        opaque = request.mm_features or request.prompt_embeds is not None
        whole = opaque or self._tables.publishes_prompt_end
        protect = _ALL_OF_THE_PROMPT if whole else self._config.protect
        return first_target(request.num_prompt_tokens, self._tables.token_map, protect)

    def end_target(self, state: RequestState) -> int:
        """One past the last block before the recent window."""
        return self._end_target(state.full)

    def budget(self, state: RequestState) -> int:
        """How many of the request's blocks may be given up in all, for want of memory."""
        return self._budget(state, state.full)

    def excess(self, state: RequestState, full: int) -> int:
        """How many of so many full blocks the request may not keep, whatever memory there is.

        The block that is being filled counts as kept. Protection is not looked at.
        """
        most = self._max_kept_tokens
        if most is None:
            return 0
        most = max(most, state.options.memshare_max_kept_tokens or 0)
        beyond = full + 1 - self._tables.token_map.full(most)
        return max(0, min(beyond, self.most_lost(state, full)))

    def most_lost(self, state: RequestState, full: int) -> int:
        """How many of so many full blocks the request allows to be given up, whatever for."""
        asked = state.options.memshare_max_shared_fraction
        return full if asked is None else int(asked * full)

    def shareable(self, state: RequestState, full: int) -> int:
        """How many blocks can be given up once the request has this many full ones."""
        may_go = max(0, self._end_target(full) - self.first_target(state))
        by_share = min(self._budget(state, full), int(self._max_thinning * may_go))
        return max(by_share, min(self.excess(state, full), may_go))

    def _end_target(self, full: int) -> int:
        return end_target(full, self._tables.token_map, self._recent_tokens)

    def _budget(self, state: RequestState, full: int) -> int:
        asked = state.options.memshare_max_shared_fraction
        fraction = self._max_given_up if asked is None else min(self._max_given_up, asked)
        return int(fraction * full)

    def _history_of(self, request: EngineRequest) -> str:
        if self._config.scope == "request":
            return str(request.request_id)
        adapter = request.lora_request.lora_int_id if request.lora_request is not None else 0
        return f"tenant\0{request.cache_salt or ''}\0{adapter}"


def _options_of(request: EngineRequest) -> tuple[RequestOptions, str | None]:
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
