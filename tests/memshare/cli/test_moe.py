"""``memshare moe placement``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memshare.cli.main import main
from tests.memshare.moe.placement.published import DEEPSEEK_V3, LLAMA_8B, QWEN3_30B


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    return tmp_path


def placed(*words: object) -> int:
    return main(["moe", "placement", *map(str, words)])


def test_a_division_is_explained(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert placed(qwen, "--tp", 4, "--dp", 2, "--ep") == 0
    shown = capsys.readouterr().out
    assert "8 ranks: --tensor-parallel-size 4 --data-parallel-size 2 --enable-expert-par" in shown
    rank = next(line for line in shown.splitlines() if line.split()[:2] == ["5", "1"])
    assert rank.split()[2:7] == ["8-15", "1", "all", "80-95", "0-767"]
    assert "KV of a token lies on its replica's ranks once" in shown
    assert "if an all-to-all takes tokens only where their experts are" in shown


def test_divided_tokens_copies_and_uneven_experts(
    qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert placed(qwen, "--tp", 8, "--dcp", 2) == 0
    assert "1 of 2" in capsys.readouterr().out
    assert placed(qwen, "--tp", 8) == 0
    assert "KV of a token lies on 2 ranks of its replica" in capsys.readouterr().out
    assert placed(qwen, "--dp", 24, "--ep") == 0
    shown = capsys.readouterr().out
    assert "experts do not divide: some ranks hold 6, others 5" in shown
    assert "and 8 more; --json lists all" in shown


def test_json(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert placed(qwen / "config.json", "--tp", 2, "--kv-cache-dtype", "fp8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 30_532_122_624
    assert [rank["kv_heads"] for rank in found["ranks"]] == [[0, 1], [2, 3]]
    assert found["ranks"][0]["kv_bytes_per_token"] == 48 * 2 * 2 * 128
    assert found["traffic"]["sent"] == found["traffic"]["routed_sent"] > 0


def test_a_proposal(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert placed(qwen, "--gpus", 8, "--gpu-memory", 80) == 0
    shown = capsys.readouterr().out.splitlines()
    taken = next(line for line in shown if line.lstrip().startswith("take"))
    options = taken[taken.index("--") :]
    assert f"8 ranks: {options}" in shown
    assert placed(qwen, "--gpus", 8, "--gpu-memory", 80, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["candidates"][0]["parallelism"] == found["parallelism"]


def test_dense_models_are_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert placed(tmp_path, "--tp", 2) == 0
    shown = capsys.readouterr().out
    assert "dense" in shown
    assert "channels" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tp", "3"], "cannot be divided so:\ntensor_parallel_size = 3: does not divide"),
        (["--gpus", "8"], "--gpus and --gpu-memory go together"),
        (["--gpus", "8", "--gpu-memory", "80", "--tp", "2"], "--gpus asks for a proposal: leave"),
        (["--gpus", "1", "--gpu-memory", "24"], "a rank's weights are 56.87 GiB\n    fix: more"),
    ],
)
def test_errors(
    qwen: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert placed(qwen, *words) == 1
    assert said in capsys.readouterr().err


def test_a_model_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert placed("nowhere") == 1
    assert "nowhere: cannot be read as a model's configuration" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert placed("nobody/nothing-at-all") == 1
    assert "cannot be had from the hub" in capsys.readouterr().err


def test_a_model_that_is_too_large_for_any_division(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    assert placed(tmp_path, "--gpus", 4, "--gpu-memory", 80) == 1
    assert "4 x 80.00 GiB: too small for the weights" in capsys.readouterr().err
