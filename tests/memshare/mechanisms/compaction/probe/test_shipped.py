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


@pytest.mark.parametrize("name", [SMOLLM2.name, REASONER])
def test_a_shipped_probe_says_what_it_is(name: str) -> None:
    probe = read_probe(PROBES / f"{name}.safetensors")
    assert probe.card.model == name
    assert probe.card.judged, "no figures: memshare probe evaluate --record"
    assert (PROBES / f"{name}.md").read_text(encoding="utf-8") == probe.card.markdown()


@pytest.mark.parametrize("name", [SMOLLM2.name, REASONER])
@pytest.mark.parametrize("other", [SMOLLM2.name, REASONER])
def test_a_shipped_probe_fits_its_model_and_not_the_other(name: str, other: str) -> None:
    folder = cache_folder() / other
    weights = fingerprint(str(folder)) if folder.is_dir() else None
    if weights is None:
        pytest.skip(f"{other} has not been prepared: make model")
    card = read_probe(PROBES / f"{name}.safetensors").card
    found = list(misfits(card, ServedModel(other, 30, 3, 64), weights))
    assert (found == []) == (name == other)
    assert all(reason.startswith("weights: ") for reason in found)
