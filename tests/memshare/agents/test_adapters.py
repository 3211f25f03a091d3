"""Adapters on disk: what is read, what is refused, and which make a family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memshare.agents.adapter import SETTINGS, WEIGHTS, adapters_by_name, read_adapter
from memshare.agents.base import BaseModelFacts, facts_of, identity_of, read_facts
from memshare.agents.family import Family
from memshare.agents.memory import padded, plain, widened
from memshare.agents.refusals import check_adapters, faults_of
from memshare.config import AgentsConfig, ConfigError
from tests.memshare.agents.tiny import tiny_config, write_adapter

BASE = facts_of("tiny", tiny_config())


@pytest.fixture(scope="session")
def roles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with the same A on ``v_proj``, and one with another, of another rank."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "plan": write_adapter(folder / "plan", seed=1, a_seed=9),
        "act": write_adapter(folder / "act", seed=2, a_seed=9),
        "other": write_adapter(folder / "other", seed=3, rank=6),
    }


def agents(scheme: str, roles: dict[str, Path], **fields: Any) -> AgentsConfig:
    return AgentsConfig.model_validate({"scheme": scheme, "adapters": roles, **fields})


def family(scheme: str, roles: dict[str, Path], base: str = "base") -> Family:
    return Family(scheme, tuple(adapters_by_name(roles)), base)


def faults(
    scheme: str, roles: dict[str, Path], base: BaseModelFacts | None = BASE, **fields: Any
) -> list[str]:
    return list(faults_of(adapters_by_name(roles), agents(scheme, roles, **fields), base))


def some(roles: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: roles[name] for name in names}


# ---- what is read ----


def test_an_adapter_is_read_as_peft_wrote_it(roles: dict[str, Path]) -> None:
    adapter = read_adapter("plan", roles["plan"])
    assert (adapter.rank, adapter.value_rank, adapter.settings.r) == (4, 4, 4)
    assert {(m.layer, m.part, m.inputs, m.outputs) for m in adapter.modules} == {
        (layer, part, 64, outputs)
        for layer in (0, 1)
        for part, outputs in (("q_proj", 64), ("v_proj", 32))
    }
    saved = load_file(roles["plan"] / WEIGHTS)
    matrices = adapter.value_down()
    assert matrices.keys() == {0, 1}
    for layer, matrix in matrices.items():
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_A.weight"
        assert torch.equal(matrix, saved[name])


def test_the_shapes_of_a_base_model(tmp_path: Path) -> None:
    assert BaseModelFacts("tiny", 64, 2, 4, 2, 16) == BASE
    tiny_config().save_pretrained(tmp_path)
    assert read_facts(tmp_path) == BaseModelFacts(str(tmp_path), 64, 2, 4, 2, 16)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="give the folder of the base model"):
        read_facts(tmp_path)


def test_a_base_model_is_told_from_others(tmp_path: Path) -> None:
    """By its name if it has no folder here; else by its weights, wherever in the file they
    differ."""
    assert identity_of("org/model") == "org/model"
    tiny_config().save_pretrained(tmp_path)
    weights = {"first": torch.zeros(4096), "last": torch.zeros(4096)}
    save_file(weights, tmp_path / "model.safetensors")
    before = identity_of(str(tmp_path))
    assert identity_of(str(tmp_path)) == before
    for name in weights:
        save_file(weights | {name: torch.ones(4096)}, tmp_path / "model.safetensors")
        assert identity_of(str(tmp_path)) != before
    save_file(weights, tmp_path / "model.safetensors")
    assert identity_of(str(tmp_path)) == before
    tiny_config(rope_theta=5.0).save_pretrained(tmp_path)
    assert identity_of(str(tmp_path)) != before


# ---- what cannot be read ----


def _no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _no_settings(folder: Path) -> None:
    (folder / SETTINGS).unlink()


def _settings_no_json(folder: Path) -> None:
    (folder / SETTINGS).write_text("{")


def _settings_without_rank(folder: Path) -> None:
    (folder / SETTINGS).write_text(json.dumps({"peft_type": "LORA"}))


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _torn(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _no_lora(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS) | {"x.lora_magnitude_vector": torch.ones(3)}
    save_file(tensors, folder / WEIGHTS)


def _half(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, folder / WEIGHTS)


def _mismatched(folder: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file(load_file(folder / WEIGHTS) | {name: torch.ones(32, 3)}, folder / WEIGHTS)


SPOILT: dict[Callable[[Path], None], tuple[str, str]] = {
    _no_folder: ("there is no such folder", "save_pretrained"),
    _no_settings: ("has no adapter_config.json", "save_pretrained"),
    _settings_no_json: ("adapter_config.json cannot be read", "save the adapter again"),
    _settings_without_rank: ("r: Field required", "save the adapter again"),
    _no_weights: ("has no adapter_model.safetensors", "save_pretrained"),
    _pickled: ("has no adapter_model.safetensors", "safe_serialization=True"),
    _torn: ("adapter_model.safetensors cannot be read", "save the adapter again"),
    _no_lora: ("'x.lora_magnitude_vector', which is no LoRA matrix", "save the adapter again"),
    _half: ("only one of the two matrices", "save the adapter again"),
    _mismatched: ("do not go together", "save the adapter again"),
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__.strip("_"))
def test_what_cannot_be_read_is_named_with_its_fix(
    spoil: Callable[[Path], None], roles: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(roles["plan"], folder)
    read_adapter("plan", folder)
    spoil(folder)
    with pytest.raises(ConfigError) as caught:
        read_adapter("plan", folder)
    message, fix = str(caught.value).split("\n    fix: ")
    what, wanted = SPOILT[spoil]
    assert message.startswith(f"agents.adapters.plan = {str(folder)!r}: ")
    assert what in message
    assert wanted in fix


# ---- what cannot share ----


def assert_one(found: list[str], start: str, what: str, fix: str) -> None:
    (fault,) = found
    message, advice = fault.split("\n    fix: ")
    assert message.startswith(start)
    assert what in message
    assert fix in advice


def test_the_adapters_of_this_module_can_share(roles: dict[str, Path]) -> None:
    assert faults("base_lr_shared", some(roles, "plan", "act")) == []
    assert faults("stacked", roles) == []
    assert faults("full_shared", roles) == []


@pytest.mark.parametrize("scheme", ["base_lr_shared", "stacked", "full_shared"])
@pytest.mark.parametrize("part", ["k_proj", "o_proj", "up_proj"])
def test_adapters_on_other_modules(scheme: str, part: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", seed=1, targets=["q_proj", "v_proj", part])
    found = faults(scheme, {"plan": folder})
    assert_one(found, "agents.adapters.plan: it changes ", part, "'nonshared'")
    assert faults("nonshared", {"plan": folder}) == []


def test_a_matrices_that_differ(roles: dict[str, Path]) -> None:
    found = faults("base_lr_shared", some(roles, "plan", "act", "other"))
    assert_one(found, "agents.adapters.other: its A matrix", "of 'plan' in layer 0", "'stacked'")


def test_a_matrices_that_differ_in_one_layer(roles: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(roles["act"], changed)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    tensors = load_file(changed / WEIGHTS)
    tensors[name][0, 0] += 1e-4
    save_file(tensors, changed / WEIGHTS)
    found = faults("base_lr_shared", {"plan": roles["plan"], "changed": changed})
    assert_one(found, "agents.adapters.changed: ", "of 'plan' in layer 1", "frozen")


def test_a_rank_above_the_limit(roles: dict[str, Path]) -> None:
    found = faults("stacked", roles, max_rank=4)
    assert_one(found, "agents.adapters.other: its rank is 6", "max_rank 4", "raise agents.max_rank")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True), ("lora_bias", True), ("bias", "all"), ("modules_to_save", ["lm_head"]),
        ("alora_invocation_tokens", [1, 2]), ("layer_replication", [[0, 1]]),
        ("use_bdlora", {"x": 1}), ("use_qalora", True), ("fan_in_fan_out", True),
        ("peft_type", "VERA"),
    ],
)  # fmt: skip
def test_kinds_of_adapters_that_cannot_share(
    field: str, value: object, roles: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(roles["plan"], folder)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | {field: value}))
    found = faults("stacked", {"plan": folder})
    assert_one(found, f"agents.adapters.plan: {field} is {value!r}", "", "train it")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_hidden_layers": 1}, "changes layer 1, and tiny has 1 layers"),
        ({"num_key_value_heads": 4}, "v_proj goes from 64 to 32, and in tiny from 64 to 64"),
        ({"hidden_size": 96}, "q_proj goes from 64 to 64, and in tiny from 96 to 64"),
    ],
)
def test_another_base(changes: dict[str, int], what: str, roles: dict[str, Path]) -> None:
    found = faults("stacked", some(roles, "plan"), facts_of("tiny", tiny_config(**changes)))
    assert_one(found, "agents.adapters.plan: it belongs to another base model", what, "serve the")


def test_all_faults_are_told_at_once(roles: dict[str, Path]) -> None:
    config = agents("base_lr_shared", roles, max_rank=5)
    with pytest.raises(ConfigError) as caught:
        check_adapters(adapters_by_name(roles), config)
    assert str(caught.value).count("    fix: ") == 2
    check_adapters(adapters_by_name(some(roles, "plan")), config)


# ---- families ----


def test_columns_of_a_shared_matrix(roles: dict[str, Path]) -> None:
    shared = family("base_lr_shared", some(roles, "plan", "act"))
    assert shared.columns == {"plan": range(4), "act": range(4)}
    assert shared.width == 8
    down = shared.value_down(2, 64)
    assert down.shape == (2, 8, 64)
    for layer, matrix in read_adapter("act", roles["act"]).value_down().items():
        assert torch.equal(down[layer, :4], matrix)
    assert not down[:, 4:].any()


def test_columns_of_stacked_matrices(roles: dict[str, Path]) -> None:
    stacked = family("stacked", roles)
    assert stacked.columns == {"plan": range(4), "act": range(4, 8), "other": range(8, 14)}
    assert stacked.width == 16
    down = stacked.value_down(2, 64)
    for adapter in stacked.adapters:
        own = stacked.columns[adapter.name]
        for layer, matrix in adapter.value_down().items():
            assert torch.equal(down[layer, own.start : own.stop], matrix)


def test_an_adapter_without_values_reads_no_columns(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", seed=1, targets=["q_proj"])
    assert faults("base_lr_shared", {"plan": folder}) == []
    queries = family("stacked", {"plan": folder})
    assert (queries.columns, queries.width) == ({"plan": range(0)}, 0)


def test_sharing_everything_caches_no_columns(roles: dict[str, Path]) -> None:
    assert family("full_shared", roles).columns == {}
    assert family("full_shared", roles).width == 0


def test_a_familys_key_changes_with_all_that_its_blocks_depend_on(
    roles: dict[str, Path], tmp_path: Path
) -> None:
    pair = some(roles, "plan", "act")
    key = family("base_lr_shared", pair).key
    assert family("base_lr_shared", pair).key == key
    assert family("base_lr_shared", {"a": pair["plan"], "b": pair["act"]}).key == key
    changed = tmp_path / "act"
    shutil.copytree(pair["act"], changed)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors = load_file(changed / WEIGHTS)
    tensors[name][0, 0] += 1e-4
    save_file(tensors, changed / WEIGHTS)
    others = [
        family("stacked", pair),
        family("stacked", {"act": pair["act"], "plan": pair["plan"]}),  # other columns
        family("full_shared", pair),
        family("base_lr_shared", pair, base="another"),
        family("base_lr_shared", some(pair, "plan")),
        family("base_lr_shared", {"plan": pair["plan"], "act": changed}),
    ]
    assert len({key, *(other.key for other in others)}) == len(others) + 1


# ---- memory ----


def test_memory_of_a_token() -> None:
    base = BaseModelFacts("model", hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64)
    alone = plain(base).bytes_per_token(base, 2)
    assert alone == 30 * 3 * (64 + 64) * 2
    assert widened(base, 8).bytes_per_token(base, 2) / (3 * alone) == pytest.approx(0.354, abs=1e-3)
    cpu = padded(base, 8, [32, 64, 80, 96])
    assert cpu is not None
    assert (cpu.keys, cpu.values) == (80, 80)
    assert cpu.bytes_per_token(base, 2) / (3 * alone) == pytest.approx(0.417, abs=1e-3)
    assert padded(base, 40, [32, 64, 80, 96]) is None
