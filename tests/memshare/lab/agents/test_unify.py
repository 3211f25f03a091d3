"""``memshare agents unify``: the same adapters with one A, and what fewer rows lose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from memshare.agents.adapter import read_adapter
from memshare.agents.family import Family
from memshare.agents.refusals import faults_of
from memshare.cli.main import main
from memshare.config import AgentsConfig
from memshare.lab.agents.unify import Unifier, _Part, unify
from tests.memshare.agents.tiny import tiny_config, write_adapter

ROLES = {"plan": 4, "act": 2, "reflect": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters with A matrices of their own, of different ranks; one of queries alone."""
    folder = tmp_path_factory.mktemp("unify")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "base")
    for seed, (role, rank) in enumerate(ROLES.items()):
        write_adapter(folder / role, seed=seed, rank=rank)
    write_adapter(folder / "queries", seed=7, targets=["q_proj"])
    write_adapter(folder / "keys", seed=8, targets=["k_proj"])
    return folder


def unified(home: Path, output: Path, *more: str, roles: tuple[str, ...] = tuple(ROLES)) -> int:
    folders = (str(home / role) for role in roles)
    return main(["agents", "unify", *folders, "--output", str(output), *more])


def logits(home: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(home / "base"), adapter)
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(20)[None]).logits
    return found


def faults(folder: Path, scheme: str) -> list[str]:
    folders = {role: folder / role for role in ROLES}
    adapters = [read_adapter(role, path) for role, path in folders.items()]
    config = AgentsConfig.model_validate({"scheme": scheme, "adapters": folders})
    return list(faults_of(adapters, config))


def test_nothing_is_lost_with_all_rows(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert faults(home, "base_lr_shared") != []
    assert unified(home, tmp_path / "all") == 0
    assert "written with 16 rows, 0.00% lost" in capsys.readouterr().out
    assert faults(tmp_path / "all", "base_lr_shared") == []
    for role in ROLES:
        before, after = logits(home, home / role), logits(home, tmp_path / "all" / role)
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    other = logits(home, tmp_path / "all" / "act")
    assert (other - logits(home, home / "plan")).abs().max() > 0.1, "control"


def test_fewer_rows_lose_what_is_said(home: Path, tmp_path: Path) -> None:
    assert unified(home, tmp_path / "few", "--rank", "8") == 0
    few = [read_adapter(role, tmp_path / "few" / role) for role in ROLES]
    assert Family("base_lr_shared", tuple(few), "").width == 8
    unifier = Unifier([read_adapter(role, home / role) for role in ROLES])
    worst = 0.0
    for before, after in zip(ROLES, few, strict=True):
        for layer in (0, 1):
            old, new = (product(adapter, layer) for adapter in (home / before, after.folder))
            worst = max(worst, float((old - new).norm() / old.norm()))
    assert worst == pytest.approx(unifier.lost(8), abs=1e-5)
    assert 0.05 < worst < 1
    assert unifier.lost(0) == pytest.approx(1)
    assert unifier.lost(10) < 1e-9


def product(folder: Path, layer: int) -> torch.Tensor:
    """B A with its scale, of ``v_proj``."""
    import json

    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_"
    settings = json.loads((folder / "adapter_config.json").read_text())
    up, down = tensors[f"{name}B.weight"].double(), tensors[f"{name}A.weight"].double()
    return up @ down * settings["lora_alpha"] / settings["r"]


def test_matrices_that_are_nearly_alike_take_few_rows() -> None:
    """Adapters that began with one A and went their ways."""
    torch.manual_seed(0)
    first = torch.randn(4, 64, dtype=torch.double)
    parts = {
        str(i): _Part(first + 0.01 * torch.randn_like(first), torch.randn(32, 4).double())
        for i in range(3)
    }
    found = unify(parts, list(parts))
    assert found.down.shape == (12, 64)
    torch.testing.assert_close(found.down @ found.down.T, torch.eye(12).double())
    assert found.lost[4] < 0.03
    assert found.lost[3] > 0.1
    for name, part in parts.items():
        torch.testing.assert_close(found.up[name] @ found.down, part.up @ part.down)


def test_one_without_values_adds_nothing(home: Path, tmp_path: Path) -> None:
    assert unified(home, tmp_path / "two", roles=("plan", "queries")) == 0
    for role in ("plan", "queries"):
        before, after = logits(home, home / role), logits(home, tmp_path / "two" / role)
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("roles", "more", "what"),
    [
        (("plan", "keys"), [], "it changes k_proj"),
        (("queries",), [], "none of these adapters changes v_proj"),
        (("plan", "nowhere"), [], "there is no such folder"),
        (("plan", "act"), ["--output", "PLACE"], "exists; name a new folder"),
    ],
)
def test_refusals(
    roles: tuple[str, ...], more: list[str], what: str, home: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spelled = [word.replace("PLACE", str(home)) for word in more]
    assert unified(home, tmp_path / "made", *spelled, roles=roles) == 1
    assert what in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
