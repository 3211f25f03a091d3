"""How many requests a KV cache holds, with and without sharing: arithmetic on blocks.

The model is simple on purpose. Every request has the same prompt and output. It holds the blocks of
its tokens so far, less those that sharing may give up. A cache holds as many requests as fit into
its usable blocks. The engine's own rules say which blocks may be given up: never the protected
prompt, never the recent window, never more than the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from memshare.config import MemShareConfig, ProtectConfig
from memshare.core.footprint import Footprint
from memshare.core.token_map import TokenMap


def first_target(prompt: int, token_map: TokenMap, protect: ProtectConfig) -> int:
    """First block behind the protected part of a prompt of ``prompt`` tokens."""
    protected = prompt if protect.prompt_tokens == "all" else min(prompt, protect.prompt_tokens)
    return token_map.entries(protected)


def end_target(full: int, token_map: TokenMap, recent_tokens: int) -> int:
    """One past the last block before the recent window of a request with ``full`` full blocks."""
    return token_map.full(max(0, token_map.first_position(full) - recent_tokens))


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What the requests look like.

    Attributes:
        prompt: tokens.
        output: tokens, 1 or more.
        freed: fraction of a request's full blocks that sharing gives up where it may, 0..1.
    """

    prompt: int
    output: int
    freed: float

    def held(self, written: int, footprint: Footprint, config: MemShareConfig | None) -> int:
        """Blocks that a request holds once it has written ``written`` tokens.

        Args:
            written: tokens of output so far.
            footprint: of tokens in this cache.
            config: MemShare's limits; None for plain vLLM.
        """
        tokens, token_map = self.prompt + written, footprint.token_map
        blocks = footprint.blocks(tokens)
        if config is None:
            return blocks
        full = token_map.full(tokens)
        first = first_target(self.prompt, token_map, config.protect)
        targets = max(0, end_target(full, token_map, config.recent_tokens) - first)
        fraction = min(self.freed, config.max_given_up)
        given_up = min(int(fraction * full), int(config.max_thinning * targets))
        if (most := config.budget.max_kept_tokens) is not None:
            beyond = full + 1 - token_map.full(most)
            given_up = max(given_up, min(beyond, targets))
        return blocks - given_up


@dataclass(frozen=True, slots=True)
class Concurrency:
    """Requests that one replica runs at the same time.

    Attributes:
        held: blocks that one request holds when it writes its last token.
        at_full_length: requests that fit if all of them are at their last token: none is preempted.
        spread: requests that fit if their progress is spread evenly, as under steady load.
    """

    held: int
    at_full_length: int
    spread: int


def concurrency(
    shape: RequestShape,
    usable: int,
    footprint: Footprint,
    max_num_seqs: int,
    config: MemShareConfig | None,
) -> Concurrency:
    """How many requests of one shape run at once.

    Args:
        shape: of every request.
        usable: KV blocks, without vLLM's null block.
        footprint: of tokens in this cache.
        max_num_seqs: vLLM's limit of running requests.
        config: MemShare's limits; None for plain vLLM.
    """
    held = shape.held(shape.output, footprint, config)
    steps = range(1, shape.output + 1)
    mean = sum(shape.held(step, footprint, config) for step in steps) / len(steps)
    return Concurrency(
        held, min(max_num_seqs, usable // held), min(max_num_seqs, int(usable / mean))
    )
