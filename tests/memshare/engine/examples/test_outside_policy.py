"""A policy of another package, installed by pip as its users would, in a real engine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memshare.config import ConfigError, load_config, registry
from tests.memshare.engine.harness import StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).resolve().parents[4] / "docs" / "examples" / "newest_policy"
POLICY = {"name": "newest", "spare": 1}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example, installed where Python looks for packages while this module's tests run."""
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(EXAMPLE, folder / "source")  # pip builds in the source folder
    site = folder / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", str(site), str(source)],
        check=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        registry.forget_packages()
        yield
    sys.modules.pop("newest_policy", None)
    registry.forget_packages()


def test_without_the_package_there_is_no_such_policy() -> None:
    """Negative control, before the package is installed."""
    with pytest.raises(ConfigError, match=r"policy\.name = 'newest'"):
        load_config({"policy": POLICY}, {})


@pytest.mark.usefixtures("installed")
def test_it_gives_up_blocks_under_pressure_and_every_check_holds(
    start_engine: StartEngine, tiny: str
) -> None:
    memshare = {
        "policy": POLICY,
        "budget": {"max_shared_fraction": 0.4},
        "integrity": {"check_every": 1, "on_failure": "raise"},
    }
    options = {"load_format": "dummy", "num_gpu_blocks_override": 80}
    with start_engine(tiny, memshare, **options) as engine:
        newest: list[int] = []
        apply = engine.side.part.remapper.apply

        def note(pair, cause):  # type: ignore[no-untyped-def]
            newest.append(pair.target.state.full - pair.target.index)
            return apply(pair, cause)

        engine.side.part.remapper.apply = note
        prompts = [f"Problem {i}: " + "add one to the number, " * 3 for i in range(16)]
        outputs = engine.generate(prompts, max_tokens=320)
        assert all(len(tokens) == 320 for tokens in outputs)
        totals = engine.totals
        assert totals["applied"] > 20
        assert totals["integrity_checks:passed"] > 320
        assert "integrity_checks:failed" not in totals
        # The recent window is four blocks, and one is spared: the newest that may go is the sixth.
        assert min(newest) == 6
        assert engine.is_clean()


@pytest.mark.usefixtures("installed")
def test_its_fields_are_checked_like_ours() -> None:
    with pytest.raises(ConfigError, match="did you mean 'spare'"):
        load_config({"policy": {"name": "newest", "spar": 1}}, {})
    with pytest.raises(ConfigError, match=r"policy\.spare = 'x'") as caught:
        load_config({"policy": {"name": "newest", "spare": "x"}}, {})
    assert "are left alone" in str(caught.value), "its own description is the fix"
    with pytest.raises(ConfigError, match=r"policy\.name = 'newst'.*'newest'"):
        load_config({"policy": {"name": "newst"}}, {})
