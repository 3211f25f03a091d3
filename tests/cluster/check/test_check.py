"""``memshare check`` without vLLM: reports, packages, machines, files (cluster/check)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from packaging.requirements import Requirement

from cluster.check.guard import guard_cost
from cluster.check.installed import check_installed, check_package
from cluster.check.machine import (
    OPEN_FILES,
    SHM_BYTES,
    Machine,
    Needs,
    check_host_memory,
    check_machine,
    needs_of,
)
from cluster.check.placement import place_checked
from cluster.check.report import GIB, Capacity, CheckFinding, CheckReport, Memory
from cluster.check.setup import read_setup
from cluster.config import parse_cluster_args
from cluster.guard.config import GuardConfig
from memshare.config import ConfigError
from memshare.core.capacity import Concurrency
from memshare.errors import UserError
from memshare.moe.placement.parallelism import Parallelism
from tests.memshare.moe.placement.published import LLAMA_8B, QWEN3_30B

ROOT = Path(__file__).resolve().parents[3]
GOOD = Machine(cpus=8, free_bytes=64 * GIB, shm_bytes=SHM_BYTES, open_files=OPEN_FILES)
MEMORY = Memory(GIB, 0, 2 * GIB, "as set", 16, 1 << 20, 2048, 3.5)


def levels(findings: object) -> list[str]:
    return [finding.level for finding in findings]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("machine", "needs", "level", "says"),
    [
        (GOOD, Needs(), "ok", "8 CPU cores"),
        (GOOD, Needs(cpus=9), "fail", "a replica needs 9 CPU cores"),
        (GOOD, Needs(cpus=5, replicas=2), "warn", "10 CPU cores are reserved"),
        (GOOD, Needs(gpus=2), "fail", "a replica needs 2 GPUs, and this machine has 0"),
        (replace(GOOD, gpus=(1, 1)), Needs(gpus=2), "ok", "2 GPUs"),
        (replace(GOOD, gpus=(1, 1)), Needs(gpus=2, replicas=2), "warn", "4 GPUs"),
        (replace(GOOD, shm_bytes=SHM_BYTES - 1), Needs(), "warn", "/dev/shm"),
        (replace(GOOD, open_files=1024), Needs(), "warn", "1024 files"),
    ],
)  # fmt: skip
def test_a_machine_is_judged(machine: Machine, needs: Needs, level: str, says: str) -> None:
    found = list(check_machine(machine, needs))
    assert any(finding.level == level and says in finding.text for finding in found), found
    if level == "ok":
        assert set(levels(found)) == {"ok"}
    else:
        assert all(finding.fix for finding in found if finding.level != "ok")


@pytest.mark.parametrize(
    ("free", "level"), [(100 * GIB, "ok"), (12 * GIB, "warn"), (4 * GIB, "fail")]
)
def test_memory_of_replicas_on_cpus(free: int, level: str) -> None:
    """A replica: 2 GiB and two workers of 1 + 2 GiB, 8 in all; Ray 1; two replicas 17."""
    machine = replace(GOOD, free_bytes=free)
    found = list(check_host_memory(machine, Needs(replicas=2), GIB, 2 * GIB, ranks=2, runs=False))
    assert levels(found) == [level]
    assert "17.00 GiB" in found[0].text
    # Beside the server itself, what it has taken is no fault.
    found = list(check_host_memory(machine, Needs(replicas=2), GIB, 2 * GIB, ranks=2, runs=True))
    assert levels(found) == ["ok" if level == "ok" else "warn"]


def test_needs_follow_the_application() -> None:
    def needs(**args: object) -> Needs:
        return needs_of(parse_cluster_args({"model": "m", **args}, {}))

    pool = {"evaluator": {"source": "ray", "actors": 4, "cpus_per_actor": 0.5}}
    assert needs(replicas=3, replica={"cpus": 2}, memshare=pool) == Needs(3, 2.0, 0, 2.0)
    assert needs(memshare={**pool, "mode": "off"}).extra_cpus == 0
    tp = {"tensor_parallel_size": 2}
    assert needs(engine=tp, replica={"gpus": 2}).gpus == 2
    ray = {**tp, "distributed_executor_backend": "ray"}
    assert needs(engine=ray, replica={"gpus": 2}).gpus == 2
    assert needs(scaling={"max_replicas": 4}).replicas == 4
    spread = needs(engine={**ray, "tensor_parallel_size": 8}, replica={"gpus": 8, "nodes": 2})
    assert (spread.replicas, spread.gpus) == (2, 4)


def test_installed_packages_are_those_that_were_tested() -> None:
    found = list(check_installed())
    assert set(levels(found)) == {"ok"}
    assert {"vLLM 0.32.0", "ray 2.60.0"} <= {finding.text for finding in found}
    (missing,) = check_package(Requirement("no-such-package-anywhere>=1"))
    assert (missing.level, missing.text) == ("fail", "no-such-package-anywhere is not installed")
    (other,) = check_package(Requirement("ray[serve]==2.1.0"))
    assert other.level == "fail"
    assert other.fix == "pip install 'ray[serve]==2.1.0'"


def test_a_report_for_people_and_for_programs() -> None:
    shared = Concurrency(48, 42, 80)
    report = CheckReport(
        "configs/x.yaml",
        (
            CheckFinding("versions", "ok", "fine"),
            CheckFinding("machine", "warn", "small\nvery", "grow"),
        ),
        MEMORY,
        Capacity(200, 800, 0.25, 64, Concurrency(63, 32, 60), shared),
    )
    text = report.as_text()
    assert "  warn  small\n        very\n        fix: grow" in text
    assert "2,048 of 16 tokens: 32,752 tokens" in text
    assert "25% of blocks shared" in text
    assert "times the blocks" not in text
    narrow = replace(report, memory=replace(MEMORY, kv_dtype="fp8", kv_gain=2.0))
    assert "  fp8        2.00 times the blocks of the model's own dtype" in narrow.as_text()
    assert text.endswith("Will work, with 1 warning.")
    value = json.loads(report.as_json())
    assert value["works"] is True
    assert value["memory"]["blocks"] == 2048
    assert value["capacity"]["shared"]["at_full_length"] == 42
    bad = replace(report, findings=(*report.findings, CheckFinding("model", "fail", "no", "yes")))
    assert bad.as_text().endswith("Will not work: 1 of these must be put right; 1 warning.")
    assert json.loads(bad.as_json())["works"] is False


def test_bounds_of_pages_are_reported() -> None:
    plain = CheckReport("x", (), MEMORY)
    assert "bounds" not in plain.as_text()
    bounded = CheckReport("x", (), replace(MEMORY, bounds_bytes=GIB // 8))
    assert "bounds     0.12 GiB beside the KV cache" in bounded.as_text()
    assert "6.2% of it" in bounded.as_text()
    assert json.loads(bounded.as_json())["memory"]["bounds_bytes"] == GIB // 8


def test_a_report_says_which_rank_holds_what() -> None:
    division = Parallelism(tensor_parallel_size=4, enable_expert_parallel=True)
    faults, placement = place_checked(QWEN3_30B, division, 2)
    assert faults == []
    capacity = Capacity(200, 800, 0.0, 64, Concurrency(63, 32, 60), None)
    report = CheckReport("x", (), MEMORY, capacity, placement)
    assert "  4 ranks: --tensor-parallel-size 4 --enable-expert-parallel" in report.as_text()
    assert "sent by a rank in a step of 64 tokens" in report.as_text()
    ranks = json.loads(report.as_json())["placement"]["ranks"]
    assert [rank["experts"] for rank in ranks] == [[0, 31], [32, 63], [64, 95], [96, 127]]
    assert ranks[0]["kv_bytes_of_a_request"] == 1000 * 24_576
    assert json.loads(replace(report, placement=None).as_json())["placement"] is None


def test_what_vllm_would_place_wrongly_is_refused() -> None:
    """vLLM asks that dcp divides tp, is at most tp / KV heads, and divides the queries of a KV
    head. With 2 KV heads on 12 ranks a group of 4 then has ranks of both heads."""
    heads = {"num_attention_heads": 24, "num_key_value_heads": 2, "vocab_size": 192 * 64}
    division = Parallelism(tensor_parallel_size=12, decode_context_parallel_size=4)
    (fault,), placement = place_checked(
        {**LLAMA_8B, **heads, "intermediate_size": 1200}, division, 2
    )
    assert placement is None
    assert fault.level == "fail"
    assert "6 ranks do, which it must divide" in fault.text


def test_where_there_is_nothing_to_place() -> None:
    assert place_checked(LLAMA_8B, Parallelism(), 2) == ([], None)
    assert place_checked(LLAMA_8B, Parallelism(data_parallel_size=2), 2) == ([], None)
    unknown = {"model_type": "nemotron_h"}
    assert place_checked(unknown, Parallelism(tensor_parallel_size=2), 2) == ([], None)
    assert place_checked(QWEN3_30B, Parallelism(), 2)[1] is not None


def test_what_a_guard_costs() -> None:
    """5 % of 500 + 4,000 tokens; logits of one chunk of a shadow."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        model_config=SimpleNamespace(get_vocab_size=lambda: 128 * 1024),
    )
    held = Concurrency(1, 1, 1)
    found = guard_cost(
        GuardConfig(share=0.05), Capacity(500, 4000, 0.25, 32, held, held), cast(Any, config)
    )
    assert found.level == "ok"
    assert "0.05 of the requests have a shadow of up to 4,500 prompt tokens" in found.text
    assert "at most 225 more for each request served, and 3.00 GiB of logits" in found.text


def test_files_that_cannot_be_checked(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    for text, words, symptom in (
        ("[", ["--model", "m"], "is not YAML"),
        ("- 1", ["--model", "m"], "has no fields"),
        ("mode: share", [], "name the model"),
        ("applications: []", ["--model", "m"], "leave out --model"),
        ("applications: []", [], "0 applications with import_path cluster.app:build"),
        ("aplications: []", ["--model", "m"], "aplications"),
    ):
        file.write_text(text)
        with pytest.raises((UserError, ConfigError), match=symptom):
            read_setup(file, None, words, print)
    document = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
    document["http_options"]["host"] = "0.0.0.0"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match="others could use the server, and there are no keys"):
        read_setup(file, None, [], print)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_setup(tmp_path / "none.yaml", None, [], print)
    with pytest.raises(UserError, match="--application"):
        read_setup(None, "memshare", ["--model", "m"], print)
    file.write_text("mode: observe")
    setup = read_setup(file, None, ["--model=./m"], print)
    assert (setup.memshare.mode, setup.engine) == ("observe", ("--model=./m",))


def test_applications_of_one_file_do_not_share_evaluators(tmp_path: Path) -> None:
    document = yaml.safe_load((ROOT / "configs" / "cluster.yaml").read_text())
    (app,) = document["applications"]
    app["args"]["memshare"]["evaluator"] = {"source": "ray"}
    other = {**json.loads(json.dumps(app)), "name": "other", "route_prefix": "/other"}
    document["applications"].append(other)
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match="applications memshare, other share it") as caught:
        read_setup(file, "other", [], print)
    assert "memshare.evaluator.namespace = 'memshare'" in str(caught.value)
