"""``memshare agents check``: which adapters share, and why others do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from memshare.cli.main import main
from tests.memshare.agents.tiny import tiny_config, write_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plan`` and ``act`` with one A, ``other`` with another, ``keys`` on other modules, a base
    model, and another one."""
    path = tmp_path_factory.mktemp("agents")
    write_adapter(path / "plan", seed=1, a_seed=9)
    write_adapter(path / "act", seed=2, a_seed=9)
    write_adapter(path / "other", seed=3, rank=8)
    write_adapter(path / "keys", seed=4, targets=["q_proj", "k_proj"])
    tiny_config().save_pretrained(path / "base")
    tiny_config(hidden_size=96).save_pretrained(path / "wide")
    return path


def check(*words: object) -> int:
    return main(["agents", "check", *map(str, words)])


def test_adapters_that_share(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder / "plan", f"doing={folder / 'act'}") == 0
    shown = capsys.readouterr().out
    _, shared, stacked = shown.split("base_lr_shared\n")[0], *shown.split("\nstacked\n")
    assert "plan, doing share one cache, with 8 low-rank columns" in shared
    assert "plan, doing share one cache, with 8 low-rank columns" in stacked
    assert (
        f"  scheme: base_lr_shared\n  adapters:\n    plan: {folder / 'plan'}\n    doing:" in shown
    )


def test_adapters_of_which_some_share(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(*(folder / name for name in ("plan", "act", "other"))) == 0
    shown = capsys.readouterr().out
    assert "other: its A matrix on v_proj differs from that of 'plan' in layer 0" in shown
    assert "plan, act would share one cache without the others" in shown
    assert "plan, act, other share one cache, with 16 low-rank columns" in shown
    assert "  scheme: stacked\n" in shown


def test_adapters_that_share_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder / "plan", folder / "keys") == 1
    shown = capsys.readouterr().out
    assert shown.count("keys: it changes k_proj;") == 2
    assert "To serve them" not in shown
    assert check("--base", folder / "wide", folder / "plan") == 1
    assert "plan: it belongs to another base model" in capsys.readouterr().out
    assert check("--max-rank", 4, folder / "other") == 1
    assert "other: its rank is 8, above agents.max_rank 4" in capsys.readouterr().out


@pytest.mark.engine  # vLLM says which heads its attention takes
def test_memory_of_the_agents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--base", folder / "base", folder / "plan", folder / "act") == 0
    shown = capsys.readouterr().out
    # Two layers, two KV heads of 16, two bytes; on CPUs 16 + 8 columns are padded to 32.
    assert "| nonshared | 512 | 1.000 | 512 | 1.000 |" in shown
    assert "| base_lr_shared | 320 | 0.625 | 512 | 1.000 |" in shown


def test_what_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, what in (
        ([folder / "none"], "there is no such folder"),
        ([folder / "plan", f"plan={folder / 'act'}"], "'plan' is there already; name one by NAME="),
        (["--base", folder / "plan", folder / "plan"], "give the folder of the base model"),
        (["--max-rank", 65, folder / "plan"], "give at most 64"),
    ):
        assert check(*words) == 1
        assert what in capsys.readouterr().err
