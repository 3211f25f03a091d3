"""Mechanisms of other packages: found by name, refused in words (memshare/config/registry.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memshare.config import ConfigError, load_config, registry

Install = Callable[[str, str, str], None]

GOOD = """
from typing import Literal
from memshare.config import PolicyParams
from memshare.mechanisms.contract import Mechanism

class Params(PolicyParams):
    name: Literal["{name}"]
    pace: int = 1

class Its(Mechanism[Params]):
    params = Params
    def refusals(self, setup):
        if setup.config.scope != "request":
            yield "scope: this policy works within one request"
    def scheduler_part(self, context): ...
    def worker_part(self, context): ...
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package with one module and one entry point where Python looks."""
    modules: list[str] = []

    def put(name: str, module: str, text: str) -> None:
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        entry = f"[{registry.ENTRY_POINTS}]\n{name} = {module}:Its\n"
        (info / "entry_points.txt").write_text(entry)
        modules.append(module)
        registry.forget_packages()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    for module in modules:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    registry.forget_packages()


def test_a_policy_of_another_package_is_chosen_by_its_name(install: Install) -> None:
    assert "slow" not in registry.names()
    install("slow", "slow_policy", GOOD.format(name="slow"))
    config = load_config({"policy": {"name": "slow", "pace": 3}}, {})
    assert type(config.policy).__module__ == "slow_policy"
    assert config.policy.model_dump() == {"name": "slow", "pace": 3}
    assert '"pace":3' in config.model_dump_json(), "the log line at start shows it"
    assert load_config({}, {"MEMSHARE_POLICY__NAME": "slow"}).policy.name == "slow"
    with pytest.raises(ConfigError, match="scope: this policy works within one request"):
        load_config({"policy": {"name": "slow"}, "scope": "tenant"}, {})


def test_nothing_of_it_is_imported_before_it_is_named(install: Install) -> None:
    install("slow", "slow_policy", "raise RuntimeError('it does not work here')")
    assert load_config({}, {}).policy.name == "auto"
    with pytest.raises(ConfigError, match=r"policy\.name = 'sloww'.*'twins', 'slow'"):
        load_config({"policy": {"name": "sloww"}}, {})
    assert "slow_policy" not in sys.modules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('no GPU')", r"cannot be imported \(RuntimeError\('no GPU'\)\)"),
        ("class Its: params = None", "has no searches, drops_tokens, edits_view, refusals, "),
        (GOOD.format(name="other"), r"name: Literal\['slow'\]"),
    ],
)
def test_one_that_cannot_be_used_is_refused_with_its_package(
    install: Install, text: str, said: str
) -> None:
    install("slow", "slow_policy", text)
    with pytest.raises(ConfigError, match=f"policy 'slow' of the package slow_policy.*{said}"):
        load_config({"policy": {"name": "slow"}}, {})


def test_ours_are_not_replaced_by_others(install: Install) -> None:
    install("twins", "slow_policy", GOOD.format(name="twins"))
    twins = load_config({"policy": {"name": "twins"}}, {}).policy
    assert type(twins).__module__ == "memshare.mechanisms.twins.params"
    assert registry.names().count("twins") == 1


def test_a_configuration_does_not_load_torch() -> None:
    code = (
        "import sys; from memshare.config import load_config\n"
        "for name in ('auto', 'paper', 'twins', 'oldest', 'random', 'compaction'):\n"
        "    load_config({'policy': {'name': name}}, {})\n"
        "sys.exit(', '.join({'torch', 'vllm', 'ray'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "freed"),
    [("twins", 0.25), ("paper", 0.0), ("oldest", 0.6), ("random", 0.6), ("compaction", 0.3)],
)
def test_each_mechanism_says_what_it_usually_frees(name: str, freed: float) -> None:
    """Where texts do not decide, all that the budget of its kind allows."""
    budget = {"max_shared_fraction": 0.6, "max_dropped_fraction": 0.3}
    config = load_config({"policy": {"name": name}, "budget": budget}, environ={})
    assert registry.mechanism_of(config.policy).usually_freed(config) == freed
