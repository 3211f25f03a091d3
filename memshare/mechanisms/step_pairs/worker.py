"""Stage two for pairs of blocks, on one rank."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from memshare.kv.comparer import KVComparer
from memshare.kv.similarity import PairSums
from memshare.mechanisms.step_pairs.messages import BlockAt, JobBatch


class BlockPairComparer:
    """A :class:`~memshare.mechanisms.remap.worker.Comparer` of pairs of blocks."""

    def __init__(self, kv: KVComparer) -> None:
        self.kv = kv

    def compare(self, batch: JobBatch) -> PairSums:
        """See :meth:`Comparer.compare`."""
        return self.kv.compare_blocks(
            _ids_and_positions(job.target for job in batch.jobs),
            _ids_and_positions(job.donor for job in batch.jobs),
            _ids_and_positions(batch.sample),
        )


def _ids_and_positions(blocks: Iterable[BlockAt]) -> npt.NDArray[np.int64]:
    """``[2, N]``."""
    pairs = [(block.block_id, block.position) for block in blocks]
    return np.array(pairs, np.int64).reshape(-1, 2).T
