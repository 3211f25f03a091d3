"""Which probe is for a model: a named one, or one that lies where probes are kept and fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from memshare.mechanisms.compaction.probe.card import ProbeCard
from memshare.mechanisms.compaction.probe.file import ENDING, ProbeUnusable, read_card
from memshare.mechanisms.compaction.probe.weights import fingerprint, same_weights
from memshare.user_cache import user_cache

_DATA = "memshare_lab_data"  # made from tools/lab_data


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as an engine has loaded it.

    Attributes:
        name: folder or hub id.
        layers: attention layers.
        heads: KV heads of each on one rank.
        channels: of one head.
        ranks: how many ranks share the heads.
    """

    name: str
    layers: int
    heads: int
    channels: int
    ranks: int = 1

    def first_head(self, rank: int, all_heads: int) -> int | None:
        """Number of a rank's first head among all; None if they are not spread over the ranks.

        Heads that are fewer than the ranks are repeated, as vLLM does it.
        """
        if self.heads * self.ranks == all_heads:
            return rank * self.heads
        if self.heads == 1 and self.ranks % all_heads == 0:
            return rank // (self.ranks // all_heads)
        return None


def folders() -> Iterator[Path]:
    """Where probes are kept: what the user has trained, then what was installed."""
    yield user_cache() / "probes"
    try:
        yield Path(str(files(_DATA) / "probes"))
    except ModuleNotFoundError:
        return


def find_probe(name: str | None, model: ServedModel) -> Path | None:
    """The probe to use.

    Args:
        name: of a file, or of a probe in one of the :func:`folders`; None looks for one that fits.
        model: that it is to fit.

    Returns:
        None if no name was given and no probe fits.

    Raises:
        ProbeUnusable: the named one is not there or does not fit; names the field and the fix.
    """
    weights = fingerprint(model.name)
    if name is not None:
        path = named_probe(name)
        misfit = next(misfits(read_card(path), model, weights), None)
        if misfit is not None:
            raise ProbeUnusable(f"probe {path}: {misfit}")
        return path
    for folder in folders():
        for path in sorted(folder.glob(f"*{ENDING}")):
            try:
                card = read_card(path)
            except ProbeUnusable:
                continue  # an older version's; naming it says why it cannot be used
            if weights is not None and next(misfits(card, model, weights), None) is None:
                return path
    return None


def named_probe(name: str) -> Path:
    """A file by its name, or the probe of that name in one of the :func:`folders`.

    Raises:
        ProbeUnusable: there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    places = [folder / f"{name}{ENDING}" for folder in folders()]
    for place in places:
        if place.is_file():
            return place
    kept = ", ".join(str(place) for place in places)
    raise ProbeUnusable(
        f"probe {name!r}: there is no such file, nor {kept}; leave it out to use one that fits the "
        "model, or train one with `memshare probe train`"
    )


def misfits(card: ProbeCard, model: ServedModel, weights: Sequence[float] | None) -> Iterator[str]:
    """Why a probe is not for a model, each with the fix; nothing if it is.

    Args:
        card: of the probe.
        model: as it is served.
        weights: its fingerprint; None if there is none, and nothing can be said about them.
    """
    fix = f"name another file, or `memshare probe train --model {model.name}`"
    for field in ("layers", "channels"):
        theirs, ours = getattr(card, field), getattr(model, field)
        if theirs != ours:
            yield f"{field}: it is for {theirs}, and {model.name} has {ours}; {fix}"
    if model.first_head(0, card.heads) is None:
        yield (
            f"heads: it is for {card.heads}, and {model.name} has {model.heads} on each of "
            f"{model.ranks} ranks; {fix}"
        )
    elif card.group(model.heads) is None:
        sizes = ", ".join(map(str, card.tensor_parallel_sizes))
        kinds = " or ".join(map(str, card.together))
        yield (
            f"together: it reads {kinds} heads together, and a rank has {model.heads}; "
            f"serve with a tensor-parallel size of {sizes}, or `memshare probe train --model "
            f"{model.name} --heads-together 1`"
        )
    if weights is not None and card.weights is not None and not same_weights(card.weights, weights):
        yield f"weights: it was trained for {card.model}, and those of {model.name} differ; {fix}"
