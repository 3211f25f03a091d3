"""The role adapters of memshare-lab-data: what they are, and that they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from memshare.agents.adapter import WEIGHTS, read_adapter
from memshare.agents.refusals import faults_of
from memshare.config import AgentsConfig
from memshare.lab.agents.card import RoleCard
from memshare.small_model.names import SMOLLM2

ROOT = Path(__file__).resolve().parents[4]
SHIPPED = ROOT / "tools" / "lab_data" / "memshare_lab_data" / "roles"
ROLES = ("plan", "action", "reflect")


@pytest.mark.parametrize("role", ROLES)
def test_a_shipped_card_says_what_it_is(role: str) -> None:
    card = RoleCard.read(SHIPPED / role / "README.md")
    assert (card.role, card.base) == (role, SMOLLM2.name)
    assert card.taken_from == (None if role == "plan" else "plan")
    assert card.nll_before is not None
    assert card.nll_after is not None
    assert card.nll_after < 0.9 * card.nll_before
    assert "Apache-2.0" in card.licences
    assert "CC BY-SA" in card.licences
    assert (SHIPPED / role / "README.md").read_text("utf-8") == card.markdown()


def test_shipped_adapters_share_one_cache() -> None:
    folders = {role: SHIPPED / role for role in ROLES}
    adapters = [read_adapter(role, folder) for role, folder in folders.items()]
    config = AgentsConfig(scheme="base_lr_shared", adapters=folders)
    assert list(faults_of(adapters, config)) == []
    assert len({adapter.digest for adapter in adapters}) == len(ROLES)
    for adapter in adapters:
        assert {module.part for module in adapter.modules} == {"q_proj", "v_proj"}


def test_adapters_and_cards_are_all_that_is_shipped() -> None:
    """No record of what they were trained on, whose licence asks for more than ours."""
    files = [path.relative_to(SHIPPED) for path in SHIPPED.rglob("*") if path.is_file()]
    of_each = {"README.md", "adapter_config.json", WEIGHTS}
    assert {str(path) for path in files} == {"README.md"} | {
        f"{role}/{name}" for role in ROLES for name in of_each
    }
    assert sum((SHIPPED / path).stat().st_size for path in files) < 1.2e6
