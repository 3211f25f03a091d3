"""Who may stand beside MemShare, and on what terms; workers whose report comes late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from memshare.config import load_config
from memshare.engine.beside import rules
from memshare.engine.compatibility import UnsupportedSetup, check_before_load
from memshare.engine.messages import WorkerHandshake, WorkerMessage
from memshare.plug_in import connector_options, host_memory, plug_in
from tests.memshare.engine.harness import StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

HOST = host_memory(1)


def with_connectors(tiny: str, memshare: dict[str, Any], other: dict[str, Any]) -> Any:
    """The configuration of an engine with another connector beside MemShare's. It is named when
    vLLM has made the configuration, for which it looks at the class: some need other packages."""
    from vllm.engine.arg_utils import EngineArgs

    options = plug_in(memshare, beside=[HOST])
    config = EngineArgs(
        tiny, max_model_len=512, load_format="dummy", **options
    ).create_engine_config()
    config.kv_transfer_config.kv_connector_extra_config["connectors"][1] = other
    return config


def changed(transfer: dict[str, Any], **extra: object) -> dict[str, Any]:
    return transfer | {
        "kv_connector_extra_config": transfer.get("kv_connector_extra_config", {}) | extra
    }


LMCACHE = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}
UNKNOWN = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize("other", [HOST, LMCACHE, NIXL], ids=lambda other: other["kv_connector"])
def test_who_keeps_to_prompts_is_accepted(tiny: str, other: dict[str, Any]) -> None:
    check_before_load(with_connectors(tiny, {}, other))


@pytest.mark.parametrize(
    ("memshare", "other", "told"),
    [
        ({}, changed(HOST, offload_prompt_only=False), "offload_prompt_only is false; leave it"),
        ({}, changed(LMCACHE, **{"lmcache.save_decode_cache": True}), "save_decode_cache is True"),
        ({}, NIXL | {"kv_role": "kv_producer"}, "set it to 'kv_consumer'"),
        ({}, changed(NIXL, bidirectional_kv_xfer=True), "bidirectional_kv_xfer is true"),
        ({}, UNKNOWN, "ExampleConnector cannot stand beside MemShareConnector: it has not been"),
        ({}, UNKNOWN | {"kv_connector": "LMCacheMPConnector"}, "stores generated tokens, too"),
        ({}, UNKNOWN | {"kv_connector": "SimpleCPUOffloadConnector"}, "references of its own"),
        ({}, connector_options({}), "name MemShareConnector once, and first"),
        ({"protect": {"prompt_tokens": 64}}, HOST, "prompt_tokens is 64; leave it at 'all'"),
    ],
)
def test_who_would_copy_what_changes_is_refused(
    tiny: str, memshare: dict[str, Any], other: dict[str, Any], told: str
) -> None:
    config = with_connectors(tiny, memshare, other)
    with pytest.raises(UnsupportedSetup, match=told):
        check_before_load(config)


def test_an_environment_that_lets_lmcache_store_answers_is_seen(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCACHE_SAVE_DECODE_CACHE", "True")
    with pytest.raises(UnsupportedSetup, match="LMCACHE_SAVE_DECODE_CACHE is set"):
        check_before_load(with_connectors(tiny, {}, LMCACHE))


def reorder(connectors: list[dict[str, Any]]) -> None:
    connectors.reverse()


def leave_out(connectors: list[dict[str, Any]]) -> None:
    del connectors[0]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [(reorder, "once, and first"), (leave_out, "with that first among its connectors")],
)
def test_memshare_is_the_first_of_them(
    tiny: str, spoil: Callable[[list[dict[str, Any]]], None], told: str
) -> None:
    config = with_connectors(tiny, {}, HOST)
    spoil(config.kv_transfer_config.kv_connector_extra_config["connectors"])
    with pytest.raises(UnsupportedSetup, match=told):
        check_before_load(config)


def test_adapters_that_share_a_cache_stand_alone(tiny: str) -> None:
    config = with_connectors(tiny, {}, HOST)
    off = load_config({"mode": "off"})
    agents = off.agents.model_copy(update={"scheme": "stacked"})
    [fault] = rules.beside_faults(config, off.model_copy(update={"agents": agents}))
    assert "agents.scheme is 'stacked'" in fault


def test_steps_must_not_overlap(tiny: str) -> None:
    config = with_connectors(tiny, {}, HOST)
    config.scheduler_config.async_scheduling = True
    with pytest.raises(UnsupportedSetup, match="add --no-async-scheduling"):
        check_before_load(config)


class Talkative(KVConnectorBase_V1):
    """Stands in for a connector whose workers report to its scheduler half, as Nixl's do."""

    heard: Any = None

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return KVConnectorHandshakeMetadata()

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
        self.heard = metadata

    def get_num_new_matched_tokens(self, *_: Any) -> tuple[int, bool]:
        return 0, False

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def update_state_after_alloc(self, *_: Any) -> None: ...
    def start_load_kv(self, *_: Any, **__: Any) -> None: ...
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(self, *_: Any, **__: Any) -> None: ...
    def wait_for_save(self) -> None: ...


TALKATIVE = {
    "kv_connector": "Talkative", "kv_connector_module_path": __name__, "kv_role": "kv_both",
}  # fmt: skip


def test_reports_come_with_the_first_step_if_another_connector_has_its_own(
    tiny: str, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "_TERMS", {"Talkative": lambda _: iter(())})
    eager = {
        "policy": {"name": "oldest"},
        "trigger": {"kind": "eager"},
        "protect": {"recent_tokens": 32},
    }
    sizes = {"max_model_len": 512, "load_format": "dummy", "num_gpu_blocks_override": 40}
    options = plug_in(eager, beside=[TALKATIVE])
    with start_engine(tiny, None, **sizes, **options) as engine:
        ours, other = engine.scheduler.connector.sub_connectors
        [theirs] = other.heard.values()
        assert not isinstance(theirs, WorkerHandshake)
        assert not ours.scheduler_side.reclaimer.enabled, "nobody knows yet that tables are edited"
        engine.generate(["Tell me a story."], 200)
        assert ours.scheduler_side.reclaimer.enabled
        assert ours.scheduler_side.recorder.counters.totals["applied"] > 0

        # A rank that cannot edit its table is found out by then.
        late = WorkerMessage(handshakes=[WorkerHandshake(hooked=False)])
        with pytest.raises(UnsupportedSetup, match="0 of 1 workers"):
            ours.update_connector_output(engine_output(late))


def engine_output(message: WorkerMessage) -> Any:
    from vllm.v1.outputs import KVConnectorOutput

    return KVConnectorOutput(kv_connector_worker_meta=message)


def test_reports_of_all_ranks_arrive_together() -> None:
    first, second = (
        WorkerMessage(handshakes=[WorkerHandshake(hooked=hooked)]) for hooked in (True, False)
    )
    assert [each.hooked for each in first.aggregate(second).handshakes] == [True, False]
