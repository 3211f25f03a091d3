"""Stage-two work on pairs of tokens, as it goes to the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False, slots=True)
class TwinBatch:
    """Stage two's work on pairs of tokens, a token and its twin; one job.

    Attributes:
        job_id: the job.
        tokens: ``[4, N]`` int64: block id and position of each token, block id and position of each
            twin.
    """

    job_id: int
    tokens: npt.NDArray[np.int64]

    def pairs_by_job(self) -> Mapping[int, int]:
        """See :meth:`~memshare.mechanisms.remap.messages.Batch.pairs_by_job`."""
        return {self.job_id: self.tokens.shape[1]}
