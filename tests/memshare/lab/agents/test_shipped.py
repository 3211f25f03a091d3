"""The role adapters of memshare-lab-data: what they say, whom they share with, what they weigh."""

from __future__ import annotations

from pathlib import Path

import pytest

from memshare.agents.adapter import WEIGHTS, read_adapter
from memshare.agents.base import BaseModelFacts
from memshare.agents.refusals import faults_of
from memshare.config import AgentsConfig
from memshare.lab.agents.card import RoleCard
from memshare.lab.agents.records import read_records, trajectories

ROLES = ("plan", "action", "reflect")
DATA = Path(__file__).resolve().parents[4] / "tools" / "lab_data" / "memshare_lab_data" / "roles"
SMOLLM2 = BaseModelFacts("smollm2-135m", hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64)


@pytest.mark.parametrize("role", ROLES)
def test_a_card_says_what_was_trained(role: str) -> None:
    card = RoleCard.read(DATA / role / "README.md")
    assert (card.role, card.base) == (role, "smollm2-135m")
    assert card.taken_from == (None if role == "plan" else "plan")
    assert card.nll_before is not None
    assert card.nll_after is not None
    assert card.nll_after < 0.8 * card.nll_before
    assert "Apache-2.0" in card.licences
    layers = {module.layer for module in read_adapter(role, DATA / role).modules}
    assert layers == set(range(card.first_layer, 30))
    assert (DATA / role / WEIGHTS).stat().st_size < 1e6


@pytest.mark.parametrize("scheme", ["base_lr_shared", "stacked", "full_shared"])
def test_they_share(scheme: str) -> None:
    folders = {role: DATA / role for role in ROLES}
    adapters = [read_adapter(role, folder) for role, folder in folders.items()]
    config = AgentsConfig.model_validate({"scheme": scheme, "adapters": folders})
    assert list(faults_of(adapters, config, SMOLLM2)) == []


def test_records_that_they_have_not_seen() -> None:
    """Every trajectory is as whole as it was recorded, and of all three roles."""
    records = {role: read_records(DATA / "held_out" / f"{role}.jsonl") for role in ROLES}
    for role, of_role in records.items():
        card = RoleCard.read(DATA / role / "README.md")
        assert card.records[1] == len(of_role)
        every = [record for some in records.values() for record in some]
        assert len(set(trajectories(every))) == card.trajectories[1]
