"""The probes of memshare-lab-data, and the models that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest

from memshare.mechanisms.compaction.probe.file import read_probe
from memshare.mechanisms.compaction.probe.find import ServedModel, misfits
from memshare.mechanisms.compaction.probe.weights import fingerprint
from memshare.small_model.names import SMOLLM2, cache_folder
from memshare.small_model.reasoner import NAME as REASONER

ROOT = Path(__file__).resolve().parents[5]
PROBES = ROOT / "tools" / "lab_data" / "memshare_lab_data" / "probes"


PADDED = f"{SMOLLM2.name}-tp2"
SIZES = {SMOLLM2.name: (3, 1), REASONER: (3, 1), PADDED: (4, 2)}
"""KV heads, and the tensor-parallel size that a model is served with."""


@pytest.mark.parametrize("name", SIZES)
def test_a_shipped_probe_says_what_it_is(name: str) -> None:
    probe = read_probe(PROBES / f"{name}.safetensors")
    assert probe.card.model == name
    assert probe.card.judged, "no figures: memshare probe evaluate --record"
    assert (PROBES / f"{name}.md").read_text(encoding="utf-8") == probe.card.markdown()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("other", SIZES)
def test_a_shipped_probe_fits_its_model_and_no_other(name: str, other: str) -> None:
    folder = cache_folder() / other
    weights = fingerprint(str(folder)) if folder.is_dir() else None
    if weights is None:
        pytest.skip(f"{other} has not been prepared: make model")
    card = read_probe(PROBES / f"{name}.safetensors").card
    heads, ranks = SIZES[other]
    found = list(misfits(card, ServedModel(other, 30, heads // ranks, 64, ranks), weights))
    assert (found == []) == (name == other)
    assert name == other or any(reason.startswith("weights: ") for reason in found)
