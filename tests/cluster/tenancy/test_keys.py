"""Key tables (cluster/tenancy/keys.py) and ``memshare keys``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.tenancy.keys import (
    Keyring,
    KeySource,
    KeyTable,
    MemSharePermissions,
    Tenant,
    WatchedKeys,
    hash_key,
    new_key,
    parse_table,
)
from memshare.cli.main import main
from memshare.config import ConfigError
from memshare.request_options import RequestOptions

KEY = "msk_a"


def table(**tenants: dict[str, object]) -> str:
    """A table in which each tenant has one key: its own name."""
    return yaml.safe_dump(
        {"tenants": {n: {"keys": {"k": hash_key(n)}} | fields for n, fields in tenants.items()}}
    )


def test_a_key_opens_its_tenant() -> None:
    keyring = Keyring(parse_table(table(acme={"concurrent_requests": 3}, umbrella={}), "t"))
    grant = keyring.find("acme")
    assert grant is not None
    assert (grant.name, grant.tenant.concurrent_requests) == ("acme", 3)
    assert len(keyring) == 2


def test_defaults_allow_everything_but_operating() -> None:
    tenant = parse_table(table(acme={}), "t").tenants["acme"]
    assert not tenant.operator
    assert (tenant.concurrent_requests, tenant.tokens_per_minute, tenant.models) == (None,) * 3
    assert tenant.permissions == MemSharePermissions()


@given(key=st.text())
def test_no_other_key_opens_anything(key: str) -> None:
    keyring = Keyring(parse_table(table(acme={}, umbrella={}), "t"))
    grant = keyring.find(key)
    assert (grant.name if grant else None) == (key if key in ("acme", "umbrella") else None)


def test_a_hash_is_no_key() -> None:
    assert Keyring(parse_table(table(acme={}), "t")).find(hash_key("acme")) is None


def test_keys_are_long_random_and_without_their_hash() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("msk_") and len(key) == 47 for key in keys)


WRONG: list[tuple[str, str]] = [
    ("", "holds nothing"),
    ("- a", "holds a list"),
    ("tenants: [", "is not YAML"),
    ("tenants: {}", "tenants = {}"),
    ("tenant: {}", "did you mean 'tenants'?"),
    ("tenants: {acme: {}}", "tenants.acme.keys"),
    ("tenants: {acme: {keys: {}}}", "tenants.acme.keys = {}"),
    ("tenants: {acme: {keys: {ci: msk_secret}}}", "tenants.acme.keys.ci"),
    ("tenants: {'a b': {keys: {ci: '%s'}}}", "a b"),
    ("tenants: {acme: {keys: {ci: '%s'}, concurrent_requests: 0}}", "concurrent_requests = 0"),
    ("tenants: {acme: {keys: {ci: '%s'}, concurrent_requests: yes}}", "number is wanted"),
    ("tenants: {acme: {keys: {ci: '%s'}, tokens_per_minute: -1}}", "tokens_per_minute = -1"),
    ("tenants: {acme: {keys: {ci: '%s'}, sequences_per_request: 0}}", "sequences_per_request = 0"),
    ("tenants: {acme: {keys: {ci: '%s'}, models: []}}", "models = []"),
    ("tenants: {acme: {keys: {ci: '%s'}, operator: perhaps}}", "operator = 'perhaps'"),
    ("tenants: {acme: {keys: {ci: '%s'}, token_per_minute: 1}}", "'tokens_per_minute'"),
    ("tenants: {acme: {keys: {ci: '%s'}, permissions: {may_opt: 1}}}", "'may_opt_out'"),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_wrong_table_is_named_with_its_fix(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_table(text.replace("%s", hash_key(KEY)), "the table")
    assert "the table" in str(caught.value)
    assert said in str(caught.value)
    assert "fix: " in str(caught.value)


@pytest.mark.parametrize("model", [KeyTable, Tenant, MemSharePermissions])
def test_every_field_is_documented(model: type[BaseModel]) -> None:
    assert [n for n, field in model.model_fields.items() if not field.description] == []


def test_file_and_variable_add_up(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(table(acme={}))
    source = KeySource(file, "KEYS")
    assert set(source.read({"KEYS": table(umbrella={})}).tenants) == {"acme", "umbrella"}
    with pytest.raises(ConfigError, match=r"tenants\.acme is in auth\.file and in auth\.variable"):
        source.read({"KEYS": table(acme={})})
    with pytest.raises(ConfigError, match="no such variable"):
        source.read({})
    theft = table(umbrella={"keys": {"k": hash_key("acme")}})
    with pytest.raises(ConfigError, match="is the same key as"):
        source.read({"KEYS": theft})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"auth\.file = .*cannot be read") as caught:
        KeySource(tmp_path / "none.yaml", None).read()
    assert "fix: " in str(caught.value)


def write(file: Path, text: str) -> None:
    """As an editor does, a second later by the file's clock."""
    later = file.stat().st_mtime_ns + 10**9 if file.exists() else None
    file.write_text(text)
    if later is not None:
        os.utime(file, ns=(later, later))


def test_a_changed_table_is_taken_over_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    write(file, table(acme={}))
    keys = WatchedKeys(KeySource(file, None))
    assert keys.look() is None

    write(file, table(umbrella={}))
    assert keys.find("umbrella") is None, "not before the next look"
    assert keys.look() == "used"
    assert keys.find("acme") is None
    assert keys.find("umbrella")

    write(file, "tenants: [")
    assert keys.look() == "refused"
    assert keys.look() is None, "one change is told once"
    assert keys.find("umbrella")

    file.unlink()
    assert keys.look() == "refused"
    assert keys.find("umbrella")

    write(file, table(acme={}))
    assert keys.look() == "used"
    assert keys.find("acme")
    assert keys.find("umbrella") is None


def test_a_change_that_could_not_be_read_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a revocation. It is told once."""
    file = tmp_path / "keys.yaml"
    write(file, table(acme={}))
    keys = WatchedKeys(KeySource(file, None))
    write(file, table(umbrella={}))

    def fail(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        assert [keys.look() for _ in range(3)] == ["refused", None, None]
        assert keys.find("acme")
    assert keys.look() == "used"
    assert keys.find("acme") is None

    file.rename(tmp_path / "away")
    assert [keys.look() for _ in range(2)] == ["refused", None]
    os.utime(tmp_path / "away", ns=(0, 0))
    (tmp_path / "away").rename(file)
    assert keys.look() == "used"
    assert keys.look() is None
    file.unlink()
    assert [keys.look() for _ in range(2)] == ["refused", None], "each loss is told"


def test_a_mounted_secret_is_swapped_by_a_link(tmp_path: Path) -> None:
    """As Kubernetes does: the file's own link never changes, a folder's does."""
    for version, tenant in (("v1", "acme"), ("v2", "bravo")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys.yaml").write_text(table(**{tenant: {}}))
        os.utime(tmp_path / version / "keys.yaml", ns=(0, 0))
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "keys.yaml").symlink_to("data/keys.yaml")
    keys = WatchedKeys(KeySource(tmp_path / "keys.yaml", None))
    assert keys.find("acme")
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").rename(tmp_path / "data")
    keys.look()
    assert keys.find("acme") is None
    assert keys.find("bravo")


@pytest.mark.parametrize(
    ("permissions", "options", "refused"),
    [
        ({}, {"memshare": "off", "memshare_step_threshold": 0.5}, None),
        ({"may_opt_out": False}, {"memshare": "off"}, "memshare"),
        ({"may_opt_out": False}, {"memshare": "on"}, None),
        ({"may_set_thresholds": False}, {"memshare_step_threshold": 0.5}, "memshare_step_"),
        ({"may_set_thresholds": False}, {"memshare_block_threshold": 0.5}, "memshare_block_"),
        ({"may_set_thresholds": False}, {"memshare_max_shared_fraction": 0.5}, None),
        ({"may_set_fraction": False}, {"memshare_max_shared_fraction": 0.5}, "memshare_max_"),
    ],
)
def test_permissions(
    permissions: dict[str, bool], options: dict[str, object], refused: str | None
) -> None:
    named = MemSharePermissions(**permissions).refused(RequestOptions.model_validate(options))
    assert named == refused if refused is None else str(named).startswith(refused)


def test_every_request_option_has_a_permission() -> None:
    nothing = MemSharePermissions(
        may_opt_out=False, may_set_thresholds=False, may_set_fraction=False
    )
    values: dict[str, object] = dict.fromkeys(RequestOptions.model_fields, 0.5) | {
        "memshare": "off",
        "memshare_max_kept_tokens": 640,
        "memshare_usage": "on",
    }
    free = {"memshare_usage"}  # tells callers of their own requests
    for name, value in values.items():
        refused = nothing.refused(RequestOptions.model_validate({name: value}))
        assert refused == (None if name in free else name)


def test_the_command_makes_a_key_that_the_command_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "new", "--tenant", "acme", "--name", "ci"]) == 0
    printed = capsys.readouterr()
    key = printed.err.split()[-1]
    assert key not in printed.out, "a table holds no keys"
    file = tmp_path / "keys.yaml"
    file.write_text(printed.out)
    grant = Keyring(KeySource(file, None).read()).find(key)
    assert grant is not None
    assert grant.name == "acme"
    assert main(["keys", "check", str(file)]) == 0
    assert "acme: 1 key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["new", "--tenant", "a b"], "a b"), (["check", "no/such.yaml"], "cannot be read")],
)
def test_the_command_names_what_is_wrong(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *words]) == 1
    assert said in capsys.readouterr().err
