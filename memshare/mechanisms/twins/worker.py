"""Stage two for pairs of tokens, on one rank."""

from __future__ import annotations

import numpy as np

from memshare.core.token_map import TokenMap
from memshare.kv.comparer import KVComparer
from memshare.kv.similarity import PairSums
from memshare.mechanisms.twins.messages import TwinBatch


class TokenPairComparer:
    """A :class:`~memshare.mechanisms.remap.worker.Comparer` of pairs of tokens."""

    def __init__(self, kv: KVComparer, token_map: TokenMap) -> None:
        self.kv = kv
        self._map = token_map

    def compare(self, batch: TwinBatch) -> PairSums:
        """See :meth:`Comparer.compare`."""
        blocks = np.concatenate((batch.tokens[0], batch.tokens[2]))
        positions = np.concatenate((batch.tokens[1], batch.tokens[3]))
        return self.kv.compare_tokens(blocks, self._map.slot(positions), positions)
