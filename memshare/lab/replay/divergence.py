"""How far a model's next-token distributions are from the exact ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

COLUMNS = ("kl", "delta_nll", "same_top")  # of the measurements of one trace, one row a token


def measure(exact: Tensor, shared: Tensor, token: Tensor) -> Tensor:
    """Compare next-token distributions.

    Args:
        exact: ``[N, vocabulary]`` float32 log-probabilities.
        shared: the same with some blocks given up.
        token: ``[N]`` int64, the recorded next tokens.

    Returns:
        ``[N, len(COLUMNS)]`` float32.
    """
    weight = exact.exp()
    # What a narrow type cannot hold has no weight, and must not make 0 times infinity.
    kl = torch.where(weight > 0, weight * (exact - shared), 0.0).sum(-1)
    at = token[:, None]
    delta_nll = (exact.gather(1, at) - shared.gather(1, at))[:, 0]
    same_top = (exact.argmax(-1) == shared.argmax(-1)).float()
    return torch.stack((kl, delta_nll, same_top), dim=1)


@dataclass(frozen=True, slots=True)
class Divergence:
    """Means over traces, each with its standard error; nats, and a fraction of tokens.

    Attributes:
        kl: KL divergence of the shared from the exact distribution, per token.
        late_kl: the same over the second half of the tokens.
        delta_nll: how much less likely the recorded token has become.
        same_top: how often the most likely token is the same.
    """

    kl: tuple[float, float]
    late_kl: tuple[float, float]
    delta_nll: tuple[float, float]
    same_top: tuple[float, float]

    @classmethod
    def of(cls, traces: Sequence[npt.NDArray[np.float32]]) -> Divergence:
        """Sum up ``[tokens, len(COLUMNS)]`` measurements of each trace."""
        late = [trace[len(trace) // 2 :, 0] for trace in traces]
        columns = [[trace[:, i] for trace in traces] for i in range(len(COLUMNS))]
        return cls(_mean(columns[0]), _mean(late), _mean(columns[1]), _mean(columns[2]))


def _mean(traces: Sequence[npt.NDArray[np.float32]]) -> tuple[float, float]:
    means = [float(trace.mean()) for trace in traces]
    spread = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return statistics.fmean(means), spread
