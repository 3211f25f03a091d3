"""Costs of a step of a model that is divided over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from memshare.cli.main import main
from memshare.config import ConfigError
from memshare.lab.simulate.costs import DoesNotFitError, StepWork
from memshare.lab.simulate.placed import PlacedDeployment
from memshare.moe.placement.proposal import Load, Machine, propose
from tests.documents import ROOT
from tests.memshare.moe.placement.published import GPT_OSS_20B, QWEN3_30B

SHIPPED = ROOT / "configs" / "simulate" / "qwen3-30b-a3b-8xh100.yaml"
GPUS: dict[str, Any] = {
    "name": "divided", "memory_gb": 80, "bandwidth_gb_s": 3350, "link_gb_s": 450, "teraflops": 989,
}  # fmt: skip


def placed(folder: Path, model: dict[str, object] = QWEN3_30B, **changes: Any) -> PlacedDeployment:
    (folder / "config.json").write_text(json.dumps(model))
    return PlacedDeployment(model=folder, **GPUS | changes)


@pytest.mark.parametrize("by_expert", [False, True])
def test_a_decode_step_takes_what_the_proposal_bounds(tmp_path: Path, by_expert: bool) -> None:
    """Where only reading and sending take time, both count the same."""
    context, running = 4096, 128
    deployment = placed(
        tmp_path, tensor_parallel_size=4, data_parallel_size=2, enable_expert_parallel=by_expert,
        efficiency=1.0, step_overhead_s=0.0, teraflops=1e9,
    )  # fmt: skip
    machine = Machine(8, int(80e9), 8, 0.9, int(4e9), 3350e9, 450e9, 450e9)
    candidates = propose(deployment.placement.shape, machine, Load(context, running, 2))
    (same,) = (c for c in candidates if c.parallelism == deployment.placement.parallelism)
    found = deployment.costs.seconds(StepWork(running, running, running * context))
    assert found == pytest.approx(same.step_s, rel=1e-3)
    alone = deployment.model_copy(update={"bandwidth_gb_s": 2 * 3350.0}).costs
    assert alone.seconds(StepWork(running, running, running * context)) < found, "negative control"


def test_blocks_fill_what_weights_leave(tmp_path: Path) -> None:
    deployment = placed(tmp_path, tensor_parallel_size=4, enable_expert_parallel=True)
    rank = deployment.placement.ranks[0]
    room = 80e9 * 0.9 - 4e9 - rank.all_weight_bytes
    per_block = 16 * 48 * 2 * 128 * 2  # one KV head of a rank
    assert deployment.blocks == int(room // per_block)
    with pytest.raises(DoesNotFitError, match="divide it over more ranks"):
        _ = placed(tmp_path, memory_gb=60).blocks


@pytest.mark.parametrize(
    ("model", "changes", "text"),
    [
        (GPT_OSS_20B, {}, "keep a window"),
        (QWEN3_30B, {"tensor_parallel_size": 3}, "3"),
        ({"model_type": "unheard-of"}, {}, "unheard-of"),
    ],
)
def test_what_cannot_be_placed_is_refused(
    tmp_path: Path, model: dict[str, object], changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        _ = placed(tmp_path, model, **changes).placement


def test_the_shipped_deployment_is_read_from_where_it_lies(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["simulate", "--deployment", str(SHIPPED), "--accelerators", "4"]) != 0
    assert "says how its model is divided" in capsys.readouterr().err
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(GPUS | {"model": "nowhere", "tensor_paralel_size": 2}))
    assert main(["simulate", "--deployment", str(wrong)]) != 0
    assert "tensor_paralel_size" in capsys.readouterr().err
    with pytest.raises(ValidationError):
        PlacedDeployment.model_validate(GPUS | {"model": "x", "data_parallel_size": 0})
