"""Which reasoning steps are similar: by their words, and by the KV of what they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memshare.lab.plots.style import figure
from memshare.lab.replay.prefilled import PrefilledTrace

_Matrix = npt.NDArray[np.float32]


def lexical(tokens: Sequence[int], bounds: Sequence[int]) -> _Matrix:
    """``[steps, steps]``: cosine of bags of tokens, as stage one of the policy ``paper``."""
    counts: list[dict[int, int]] = []
    for first, last in pairwise(bounds):
        ids, times = np.unique(tokens[first:last], return_counts=True)
        counts.append(dict(zip(ids.tolist(), times.tolist(), strict=True)))
    columns = {token: i for i, token in enumerate(sorted({t for bag in counts for t in bag}))}
    bags = np.zeros((len(counts), len(columns)), np.float32)
    for row, bag in zip(bags, counts, strict=True):
        row[[columns[token] for token in bag]] = list(bag.values())
    bags /= np.linalg.norm(bags, axis=1, keepdims=True)
    cosines: _Matrix = bags @ bags.T
    return cosines


def kv(prefilled: PrefilledTrace, bounds: Sequence[int]) -> _Matrix:
    """``[steps, steps]``: how much of the row's step stands in the column's, too.

    Mean over the row's tokens of the similarity of K and V to the same token in the column's step,
    the last one if it occurs more than once there; 0 where it does not occur.
    """
    tokens = prefilled.tokens.tolist()
    places: list[dict[int, int]] = [
        {tokens[position]: position for position in range(first, last)}
        for first, last in pairwise(bounds)
    ]
    matrix = np.zeros((len(places), len(places)), np.float32)
    for row, (first, last) in enumerate(pairwise(bounds)):
        own = np.arange(first, last, dtype=np.int32)
        for column, there in enumerate(places):
            twins = np.array([there.get(tokens[p], -1) for p in own.tolist()], np.int32)
            found = twins >= 0
            if found.any():
                similar = prefilled.similarity(own[found], twins[found])
                matrix[row, column] = np.maximum(similar, 0).sum() / len(own)
    return matrix


def shared_steps(
    donor_of: Mapping[int, int], block_size: int, bounds: Sequence[int]
) -> set[tuple[int, int]]:
    """Pairs of steps of which the first lost a block that points into the second."""
    pairs = set()
    for target, donor in donor_of.items():
        row, column = (
            int(np.searchsorted(bounds, block * block_size + block_size // 2, side="right")) - 1
            for block in (target, donor)
        )
        if 0 <= row < len(bounds) - 1 and 0 <= column < len(bounds) - 1:
            pairs.add((row, column))
    return pairs


def plot_steps(
    panels: Mapping[str, _Matrix], outlined: set[tuple[int, int]], title: str, path: Path
) -> None:
    """Draw heat maps side by side.

    Args:
        panels: matrices by what they show.
        outlined: (row, column) of cells to be outlined in all of them.
        title: of the whole.
        path: the picture; its ending decides the format.

    Raises:
        UserError: the picture cannot be drawn (see :func:`memshare.lab.plots.style.figure`).
    """
    with figure(path, columns=len(panels), width=4.5 * len(panels), height=4.2) as drawn:
        for panel, (name, matrix) in zip(drawn, panels.items(), strict=True):
            image = panel.imshow(matrix, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            for row, column in outlined:
                panel.plot(
                    [column - 0.5, column + 0.5, column + 0.5, column - 0.5, column - 0.5],
                    [row - 0.5, row - 0.5, row + 0.5, row + 0.5, row - 0.5],
                    color="#d55e00", linewidth=1.0,
                )  # fmt: skip
            panel.set(title=name, xlabel="step", ylabel="step")
            panel.figure.colorbar(image, ax=panel, shrink=0.8)
        drawn[0].figure.suptitle(title, fontsize="medium")
