"""Where values of the configuration come from: YAML, the environment, and which of them wins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from memshare.config import (
    ConfigError,
    MemShareConfig,
    load_config,
)
from memshare.mechanisms.baselines.params import OldestParams, RandomParams
from memshare.plug_in import plug_in

# ---- YAML ----


@pytest.mark.parametrize(("word", "mode"), [("off", "off"), ("'off'", "off"), ("share", "share")])
def test_mode_off_means_off(word: str, mode: str, tmp_path: Path) -> None:
    file = tmp_path / "memshare.yaml"
    file.write_text(f"mode: {word}\n")
    assert load_config({"config": str(file)}, {}).mode == mode
    assert load_config({}, {"MEMSHARE_MODE": word}).mode == mode


def test_mode_on_is_no_mode(tmp_path: Path) -> None:
    file = tmp_path / "memshare.yaml"
    file.write_text("mode: on\n")
    with pytest.raises(ConfigError, match=r"mode = True: .*'observe' or 'share'"):
        load_config({"config": str(file)}, {})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"mode: [", "is not YAML"),
        (b"mode: \xff", "is not YAML"),
        (b"mode: \x00", "is not YAML"),
        (b"- mode", "holds a list"),
        (b"observe", "holds a str"),
    ],
)
def test_a_file_that_is_no_configuration(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "memshare.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?s)memshare.yaml' {says}.*fix: "):
        load_config({"config": str(file)}, {})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.yaml"):
        with pytest.raises(
            ConfigError, match=f"{path}' cannot be read: [^§]*fix: correct the path"
        ):
            load_config(None, {"MEMSHARE_CONFIG": str(path)})


@pytest.mark.parametrize("content", ["", "# only a comment\n"])
def test_an_empty_file_changes_nothing(content: str, tmp_path: Path) -> None:
    file = tmp_path / "memshare.yaml"
    file.write_text(content)
    assert load_config({"config": file}, {}) == MemShareConfig()


def test_an_empty_path_names_no_file() -> None:
    assert load_config({"config": None}, {"MEMSHARE_CONFIG": ""}) == MemShareConfig()


# ---- precedence ----


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "memshare.yaml"
    path.write_text(
        "mode: observe\n"
        "trigger: {kind: eager, low_watermark: 0.01, high_watermark: 0.02}\n"
        "policy: {name: random, seed: 7}\n"
    )
    return path


def test_a_later_source_wins_field_by_field(file: Path) -> None:
    environment = {
        "MEMSHARE_CONFIG": str(file),
        "MEMSHARE_MODE": "share",
        "MEMSHARE_TRIGGER__LOW_WATERMARK": "0.03",
        "MEMSHARE_TRIGGER__HIGH_WATERMARK": "4e-2",
        "UNRELATED": "1",
    }
    config = load_config({"trigger": {"high_watermark": 0.5}}, environment)
    assert config.mode == "share", "environment over file"
    assert config.trigger.kind == "eager", "file over default"
    assert config.trigger.low_watermark == 0.03
    assert config.trigger.high_watermark == 0.5, "explicit over environment"
    assert config.steps == MemShareConfig().steps
    without = load_config({}, environment)
    assert without.trigger.high_watermark == 0.04
    assert without.policy == RandomParams(name="random", seed=7)


def test_the_option_config_wins_over_the_variable(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("mode: off\n")
    config = load_config({"config": str(other)}, {"MEMSHARE_CONFIG": str(file)})
    assert config == MemShareConfig(mode="off"), "one file is read, not both"


def test_another_policy_replaces_the_section(file: Path) -> None:
    environment = {"MEMSHARE_CONFIG": str(file)}
    assert load_config({"policy": {"name": "oldest"}}, environment).policy == OldestParams(
        name="oldest"
    ), "the seed of `random` must not be left over"
    same = load_config({"policy": {"name": "random"}}, environment).policy
    assert same == RandomParams(name="random", seed=7), "the same policy keeps its parameters"
    seed = load_config({}, environment | {"MEMSHARE_POLICY__SEED": "8"}).policy
    assert seed == RandomParams(name="random", seed=8)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("MEMSHARE_")]:
        monkeypatch.delenv(key)
    assert load_config() == MemShareConfig()
    monkeypatch.setenv("MEMSHARE_MODE", "observe")
    assert load_config().mode == "observe"
    assert load_config({}, {}).mode == "share"


def test_the_error_says_where_the_values_came_from(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"scope": "x"}, {"MEMSHARE_CONFIG": str(file)})
    assert str(caught.value).splitlines()[0].endswith(f"({file}, explicit options):")


def test_nothing_that_was_passed_in_is_changed(file: Path) -> None:
    options: dict[str, Any] = {"config": str(file), "trigger": {"kind": "eager"}}
    environment = {"MEMSHARE_TRIGGER__LOW_WATERMARK": "0.001"}
    load_config(options, environment)
    assert options == {"config": str(file), "trigger": {"kind": "eager"}}
    assert environment == {"MEMSHARE_TRIGGER__LOW_WATERMARK": "0.001"}


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        MemShareConfig().trigger.kind = "eager"  # type: ignore[misc]


def test_a_section_given_as_a_number_is_not_hidden_by_a_later_source() -> None:
    with pytest.raises(ConfigError, match="steps = 5"):
        load_config({"steps": {"min_tokens": 4}}, {"MEMSHARE_STEPS": "5"})


def test_options_for_an_engine_are_checked_before_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"policy\.min_coverage = 7"):
        plug_in({"policy": {"name": "twins", "min_coverage": 7}})
    monkeypatch.setenv("MEMSHARE_TRIGGER__LOW_WATERMARK", "7")
    with pytest.raises(ConfigError, match=r"trigger\.low_watermark = "):
        plug_in({})  # an engine would read the variable too
    assert plug_in(None) == {}, "plain vLLM is nobody's business"
