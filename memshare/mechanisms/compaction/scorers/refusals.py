"""What is refused of a choice of scorer before anything loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memshare.mechanisms.compaction.probe.file import ProbeUnusable, read_card
from memshare.mechanisms.compaction.probe.find import ServedModel, find_probe, named_probe
from memshare.mechanisms.compaction.probe.weights import fingerprint, same_weights

if TYPE_CHECKING:
    from memshare.config.setup import Setup
    from memshare.mechanisms.compaction.scorers.registry import ScorerChoice


def scorer_refusals(choice: ScorerChoice, setup: Setup) -> Iterator[str]:
    """Why the chosen scorer cannot work, each with the way out; nothing if it may.

    A named probe must be there, and trained for the model's weights, as far as these are at hand.
    Shapes are known when the model is loaded, and checked then.
    """
    if choice.probe is None or setup.engine is None:
        return
    if choice.scorer != "probe":
        yield (
            f"policy.probe = {choice.probe!r}: policy.scorer is {choice.scorer!r}, which uses "
            "none\n    fix: set policy.scorer to 'probe', or leave policy.probe out"
        )
        return
    try:
        card = read_card(named_probe(choice.probe))
    except ProbeUnusable as reason:
        yield f"policy.probe = {choice.probe!r}: {reason}"
        return
    ours = fingerprint(setup.engine.model)
    if ours is not None and card.weights is not None and not same_weights(card.weights, ours):
        yield (
            f"policy.probe = {choice.probe!r}: it was trained for {card.model}, and the weights "
            f"of {setup.engine.model} differ\n"
            "    fix: leave policy.probe out to use one that fits, or `memshare probe train "
            f"--model {setup.engine.model}`"
        )


def without_probe(setup: Setup) -> str | None:
    """Why tokens could not be kept by a probe that is found by itself; None if one fits."""
    engine = setup.engine
    if engine is None or not engine.layers:
        return "the engine is not known"
    if engine.changed is not None or engine.view_refusal is not None:
        return engine.changed or engine.view_refusal
    model = ServedModel(engine.model, engine.layers, engine.heads, engine.channels, engine.ranks)
    if find_probe(None, model) is None:
        return f"no probe fits; `memshare probe train --model {engine.model}` makes one"
    return None
