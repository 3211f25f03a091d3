"""The files of ``configs/`` for Ray Serve, and what replicas make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import (
    ClusterArgs,
    parse_cluster_args,
)
from cluster.replica import core_lists
from memshare.config import ConfigError, load_config
from tests.cluster.support.arguments import CONFIGS, application, parse


@pytest.mark.parametrize(
    ("replica", "workers", "cores", "lists"),
    [
        (0, 1, 1, "0"),
        (1, 1, 1, "1"),
        (2, 1, 1, "2"),
        (4, 1, 1, "0"),
        (0, 2, 1, "0|1"),
        (1, 2, 1, "2|3"),
        (1, 1, 2, "2,3"),
        (0, 1, 8, "0,1,2,3"),
    ],
)
def test_replicas_get_cores_of_their_own(
    replica: int, workers: int, cores: int, lists: str
) -> None:
    assert core_lists([0, 1, 2, 3], replica, workers, cores) == lists


def test_the_cpu_file_is_what_the_readme_promises() -> None:
    args = parse_cluster_args(application("cluster.yaml"), environ={})
    assert (args.model, args.public_name, args.replicas) == ("smollm2-135m", "smollm2", 1)
    assert (args.memshare.mode, args.memshare.trigger.kind) == ("share", "pressure")
    assert not args.uses_pool
    assert args.replica.gpus == 0


def test_the_demo_and_the_gpu_files_have_a_pool() -> None:
    for name in ("demo.yaml", "single-gpu.yaml", "gpu.yaml", "multi-node.yaml"):
        assert parse_cluster_args(application(name), environ={}).uses_pool, name


def test_the_gpu_file_reserves_a_gpu_for_each_worker() -> None:
    args = parse_cluster_args(application("gpu.yaml"), environ={})
    assert args.replica.gpus == args.engine.tensor_parallel_size == 2
    assert args.memshare.mode == "share"


def test_the_multi_node_file_spreads_workers() -> None:
    from cluster.app import _engine

    args = parse_cluster_args(application("multi-node.yaml"), environ={})
    assert (args.replica.nodes, args.engine.tensor_parallel_size) == (2, 8)
    group = _engine(args)._replica_config
    assert group.placement_group_strategy == "PACK"
    assert group.placement_group_bundles == [{"CPU": 8.0, "GPU": 1.0}, *[{"GPU": 1.0}] * 7]


def test_workers_of_one_node_stay_together() -> None:
    from cluster.app import _engine

    engine = {"tensor_parallel_size": 4, "distributed_executor_backend": "ray"}
    by_ray = _engine(parse(engine=engine, replica={"gpus": 4}))._replica_config
    assert by_ray.placement_group_strategy == "STRICT_PACK"
    assert len(by_ray.placement_group_bundles) == 4, "one for each worker"
    own = _engine(parse(engine={"tensor_parallel_size": 4}, replica={"gpus": 4}))._replica_config
    assert own.placement_group_bundles is None, "child processes need no group: one actor, one node"
    assert own.ray_actor_options["num_gpus"] == 4


@pytest.mark.parametrize(
    ("engine", "replica", "what"),
    [
        ({"tensor_parallel_size": 2}, {"gpus": 2}, "workers of one process"),
        ({"distributed_executor_backend": "ray"}, {"gpus": 1}, "more nodes than workers"),
    ],
)
def test_only_ray_spreads_workers_over_nodes(
    engine: dict[str, Any], replica: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        parse(engine=engine, replica={**replica, "nodes": 2})
    assert str(caught.value).startswith("replica.nodes = 2: ")
    assert "fix: " in str(caught.value)


def test_the_observe_file_changes_nothing() -> None:
    assert load_config({"config": str(CONFIGS / "observe.yaml")}, {}).mode == "observe"


def test_the_paper_file_is_the_paper() -> None:
    config = load_config({"config": str(CONFIGS / "paper.yaml")}, {})
    assert (config.policy.name, config.trigger.kind) == ("paper", "eager")
    assert (config.distance.norm, config.distance.layers) == ("paper", "all")
    assert (config.protect.recent_tokens, config.budget.max_shared_fraction) == (0, 1)
    assert config.steps.similarity_threshold == 0.9
    assert config.distance.similarity_threshold == 0.8
    assert config.protect.recent_tokens == 0


def test_what_may_be_a_key_is_not_logged() -> None:
    from cluster.config import without_secrets

    cluster = ClusterArgs.model_validate(
        {
            "model": "m",
            "replica": {"env": {"HF_TOKEN": "hf_1"}},
            "engine": {"extra": {"api_key": "sk-1", "max_logprobs": 5}},
        }
    )
    logged = without_secrets(cluster).model_dump_json()
    assert "hf_1" not in logged
    assert "sk-1" not in logged
    assert "HF_TOKEN" in logged
    assert '"max_logprobs":5' in logged
    assert cluster.replica.env == {"HF_TOKEN": "hf_1"}


def test_the_demo_is_the_default_with_a_small_cache() -> None:
    default, demo = (
        yaml.safe_load((CONFIGS / name).read_text()) for name in ("cluster.yaml", "demo.yaml")
    )
    args = demo["applications"][0]["args"]
    assert args.pop("page") == {"show_text": True}
    assert args["memshare"].pop("evaluator")["source"] == "ray"
    assert args["memshare"].pop("policy") == {"name": "twins"}, "its page shows shared blocks"
    engine = args["engine"]
    longest = engine["max_model_len"] / engine["block_size"]
    assert longest < engine.pop("num_gpu_blocks_override") < 3 * longest
    args["engine"]["max_model_len"] = 4096
    memshare = default["applications"][0]["args"]["memshare"]
    memshare.pop("evaluator")
    assert memshare.pop("policy") == {"name": "auto"}
    assert demo == default


def test_the_agents_file_is_the_default_with_roles() -> None:
    args = parse_cluster_args(application("agents.yaml"), environ={})
    assert (args.memshare.mode, args.memshare.agents.scheme) == ("off", "stacked")
    assert list(args.memshare.agents.adapters) == ["plan", "act", "reflect"]
    assert args.routing.sessions
    assert args.uses_memshare
    default, agents = (
        yaml.safe_load((CONFIGS / name).read_text()) for name in ("cluster.yaml", "agents.yaml")
    )
    for document, replicas in ((default, 1), (agents, 2)):
        served = document["applications"][0]["args"]
        assert served.pop("replicas") == replicas
        served.pop("memshare")
    assert agents == default


def test_replicas_do_not_share_an_event_log(tmp_path: Path) -> None:
    log = {"event_log": str(tmp_path / "events.jsonl")}
    assert parse(memshare=log).memshare.event_log is not None
    with pytest.raises(ConfigError, match=r"memshare.event_log = .*2 replicas"):
        parse(memshare=log, replicas=2)
