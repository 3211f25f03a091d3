"""How much a text repeats itself, by block size: what a policy could find, before any engine runs.

It needs token ids only, so it takes seconds. Only an engine can tell whether repetitions are also
similar in the KV cache (``memshare replay --observe``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memshare.core.token_map import TokenMap
from memshare.lab.markdown import table
from memshare.mechanisms.twins.index import TwinIndex
from memshare.search.evaluate import Positions

_STEP = 8  # tokens that are added to the index at a time: what they repeat must stand before them
_RUN = 4  # tokens: shorter repetitions are chance
_MOST = 0.75  # of a block's slots
_LEAST = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # coverage, of the report
_GOOD = 0.5  # coverage above which blocks count as well covered
_ROWS = 64  # blocks that are compared with all others at a time


class Opportunity(NamedTuple):
    """What one text, or the mean of several, offers at one block size; fractions of its blocks.

    Attributes:
        exact: blocks that are equal, slot by slot, to another block.
        aligned: blocks of which three quarters of the slots are equal to another block's.
        written_again: blocks of which three quarters of the tokens are written again later, at any
            offset, in a run of four tokens or more.
    """

    exact: float
    aligned: float
    written_again: float


def opportunity(tokens: Sequence[int], block_size: int) -> Opportunity:
    """Measure one text.

    Args:
        tokens: ``[T]`` token ids, at least two blocks of them.
        block_size: tokens.

    Raises:
        ValueError: the text is too short.
    """
    token_map = TokenMap(block_size)
    count = token_map.full(len(tokens))
    if count < 2:
        raise ValueError(f"{len(tokens)} tokens do not fill two blocks of {block_size}")
    ids = np.asarray(tokens[: token_map.first_position(count)], np.int64)
    equal = _most_equal_slots(ids.reshape(count, block_size))
    covered = _written_again(ids, token_map).reshape(count, block_size).mean(axis=1)
    return Opportunity(
        float((equal == block_size).mean()),
        float((equal >= _MOST * block_size).mean()),
        float((covered >= _MOST).mean()),
    )


def mean_opportunity(texts: Sequence[Sequence[int]], block_size: int) -> Opportunity:
    """Mean over texts; see :func:`opportunity`."""
    found = np.array([opportunity(text, block_size) for text in texts])
    return Opportunity(*found.mean(axis=0).tolist())


class ObservedCoverage(NamedTuple):
    """What ``mode: observe`` has seen of one request.

    Attributes:
        blocks: that it filled.
        coverage: of those that are neither prompt nor recent window, 0..1.
    """

    blocks: int
    coverage: list[float]


def report(seen: Sequence[ObservedCoverage], block_size: int) -> str:
    """Say what could be given up, and what that means; Markdown."""
    total = sum(one.blocks for one in seen)
    coverage = np.array([value for one in seen for value in one.coverage])
    rows = [[f"{least:g}", f"{(coverage >= least).sum() / total:.1%}"] for least in _LEAST]
    shown = table(("coverage at least", "blocks, of all"), rows)
    protected = 1 - len(coverage) / total
    likely = float((coverage >= _GOOD).sum()) / total
    return (
        f"In the KV cache, blocks of {block_size}: {protected:.0%} are prompt or recent window "
        f"and never given up.\n\n{shown}\n\n{_verdict(protected, likely)}"
    )


def _verdict(protected: float, likely: float) -> str:
    if protected > 0.5:
        return (
            "Not suitable as it is: most of the memory is prompt or recent window. Longer outputs, "
            "or a smaller protect.recent_tokens, would change that."
        )
    if likely < 0.1:
        return (
            f"Hardly suitable: {likely:.0%} of the blocks are well covered (at {_GOOD:g}). Giving "
            "up more than that costs accuracy; measure how much with `memshare replay`."
        )
    return (
        f"Suitable if vLLM preempts (vllm:num_preemptions_total rises): about {likely:.0%} of the "
        f"blocks are well covered (at {_GOOD:g}). Measure what giving them up costs with `memshare "
        f"replay --freed {likely:.2f}`."
    )


def _most_equal_slots(blocks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``[blocks]``: in how many slots each block equals the other block that is most like it."""
    best = np.zeros(len(blocks), np.int64)
    for start in range(0, len(blocks), _ROWS):
        rows = blocks[start : start + _ROWS]
        equal = (rows[:, None] == blocks[None]).sum(axis=2)
        equal[np.arange(len(rows)), start + np.arange(len(rows))] = 0
        best[start : start + _ROWS] = equal.max(axis=1)
    return best


def _written_again(ids: npt.NDArray[np.int64], token_map: TokenMap) -> npt.NDArray[np.bool_]:
    """``[T]``: whether a later token, in another block, ends the same run of tokens."""
    index = TwinIndex(shortest_run=_RUN)
    found = np.zeros(len(ids), np.bool_)
    for start in range(0, len(ids), _STEP):
        earlier: Positions
        earlier, later = index.add_tokens(ids[start : start + _STEP].tolist(), start)
        found[earlier[token_map.entry(earlier) != token_map.entry(later)]] = True
    return found
