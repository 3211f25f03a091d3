"""The arms of comparisons, and what is refused of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from memshare.cli.options import add_sharing, budgets, sharing
from memshare.config import BudgetConfig, load_config, registry
from memshare.errors import UserError
from memshare.lab.bench.arms import (
    NAMES,
    POLICIES,
    Arm,
    dropping,
    expand,
    limits,
    require_kv_types,
    wider,
)


def test_every_arm_has_options_that_load() -> None:
    arms = list(expand(",".join(NAMES), [0.25, 0.5], {"trigger": {"kind": "eager"}}))
    names = [arm.name for arm in arms]
    assert len(names) == len(set(names)) == len(NAMES) + len(POLICIES)
    for arm in arms:
        if arm.memshare is not None:
            config = load_config(arm.memshare, environ={})
            assert config.trigger.kind == "eager"
            if arm.name.endswith(" 0.25"):
                assert config.budget.max_shared_fraction == 0.25


def test_policies_keep_their_own_budgets_unless_one_is_asked_for() -> None:
    """A fourth is what sharing costs little; compaction with as much would not be itself."""
    default = BudgetConfig()
    for arm in expand("twins,compaction,compaction-fp8", [], {}):
        assert arm.memshare is not None
        assert load_config(arm.memshare, environ={}).budget == default
    assert default.max_dropped_fraction > default.max_shared_fraction


def test_thinning_is_asked_for_and_told_beside_the_recent_window() -> None:
    parser = argparse.ArgumentParser()
    add_sharing(parser)

    def arms(words: str) -> list[Arm]:
        args = parser.parse_args(words.split())
        return list(expand("dense,off,twins,compaction", budgets(args), sharing(args)))

    default = BudgetConfig()
    for words, budget in (
        ("", default),
        ("--thinning 0.65", default.model_copy(update={"max_thinning": 0.65})),
        ("--thinning 0.65 --budget 0.5", BudgetConfig(**limits(0.5), max_thinning=0.65)),
    ):
        ours = [arm.memshare for arm in arms(words) if arm.shares]
        assert [load_config(options, environ={}).budget for options in ours] == [budget] * 2
    said = dropping(arms("--thinning 0.65 --budget 0.5,0.6 --recent 64"))
    assert said == (
        " compaction 0.5, compaction 0.6: the last 64 tokens stay (--recent), and of those between "
        "prompt and window at most 0.65 go (--thinning)."
    )
    assert "compaction: the last 32 tokens" in dropping(arms(""))
    assert f"at most {default.max_thinning:g} go" in dropping(arms(""))
    assert dropping(expand("dense,observe,twins", [], {})) == ""


@pytest.mark.parametrize(
    ("dtype", "blocks"), [("bfloat16", 201), ("float16", 201), ("float32", 401)]
)
def test_an_fp8_cache_has_the_bytes_of_the_others(dtype: str, blocks: int) -> None:
    names = ",".join((*NAMES, "twins-fp8"))
    arms = {arm.name: arm.blocks(101, dtype) for arm in expand(names, [0.5], {})}
    assert arms.pop("fp8") == arms.pop("twins-fp8") == blocks  # the null block is not doubled
    assert set(arms.values()) == {101}
    said = wider(expand("dense,twins-fp8", [0.5], {}), 101, dtype)
    assert said == f" twins-fp8 has {blocks - 1} usable blocks in the same bytes."


def test_the_watermark_arm_is_plain_vllm_with_its_own_watermark() -> None:
    dense, watermark = expand("dense,watermark", [0.5], {})
    assert (dense.memshare, dense.watermark) == (watermark.memshare, 0.0) == (None, 0.0)
    assert 0 < watermark.watermark < 1


def test_a_policy_on_an_fp8_cache_keeps_its_options() -> None:
    plain, narrow = expand("twins,twins-fp8", [0.3], {"trigger": {"kind": "eager"}})
    assert (narrow.memshare, narrow.kv_dtype) == (plain.memshare, "fp8")


def test_an_fp8_arm_is_refused_by_a_cpu_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = list(expand("dense,fp8,twins-fp8", [0.5], {}))
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: True)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    for has_it in (True, False):
        monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda answer=has_it: answer)
        require_kv_types(arms[:1])
        with nullcontext() if has_it else pytest.raises(UserError, match="fp8, twins-fp8: vLLM"):
            require_kv_types(arms)


def test_an_unknown_arm_is_named() -> None:
    for name in ("best", "dense-fp8"):
        with pytest.raises(UserError, match=f"no arm '{name}'"):
            list(expand(f"dense,{name}", [0.5], {}))


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two installed packages: a policy that is the example of the documentation, and a broken one.
    Only the entry points are made up."""
    example = Path(__file__).resolve().parents[3] / "docs" / "examples" / "newest_policy"
    monkeypatch.syspath_prepend(str(example))
    entries = [
        EntryPoint("newest", "newest_policy:Newest", registry.ENTRY_POINTS),
        EntryPoint("broken", "no_such_module:Policy", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    registry.forget_packages()
    yield
    sys.modules.pop("newest_policy", None)
    monkeypatch.undo()
    registry.forget_packages()


@pytest.mark.usefixtures("outside")
def test_a_policy_of_an_installed_package_is_an_arm_by_its_name() -> None:
    eager = {"trigger": {"kind": "eager"}}
    plain, narrow = expand("newest,newest-fp8", [0.3], eager)
    assert plain.shares
    assert (narrow.memshare, narrow.kv_dtype) == (plain.memshare, "fp8")
    config = load_config(plain.memshare, environ={})
    assert (config.policy.name, config.budget.max_shared_fraction) == ("newest", 0.3)
    assert config.trigger.kind == "eager"


@pytest.mark.usefixtures("outside")
def test_a_policy_whose_package_is_broken_is_refused_before_engines_start() -> None:
    with pytest.raises(UserError, match=r"--arms: broken: (.|\n)*cannot be imported"):
        list(expand("dense,broken", [0.5], {}))
    with pytest.raises(UserError, match=r"no arm 'best'; choose of .*newest"):
        list(expand("best", [0.5], {}))


@pytest.mark.parametrize(
    ("arms", "budgets"), [("dense,twins,dense", [0.25]), ("twins", [0.25, 0.5, 0.25])]
)
def test_an_arm_runs_once(arms: str, budgets: list[float]) -> None:
    """Tables and records are by name: one of two would be lost."""
    with pytest.raises(UserError, match="comes twice"):
        list(expand(arms, budgets, {}))
