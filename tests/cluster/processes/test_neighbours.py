"""Two applications of one Ray Serve must not share evaluators (cluster/processes/neighbours.py).

``tests/cluster/tenancy/test_gate.py`` deploys such a file on a real Ray Serve.
"""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve.schema import ServeApplicationSchema

from cluster.config import parse_cluster_args
from cluster.processes.neighbours import BUILD, require_own_namespace
from memshare.config import ConfigError

POOL = {"evaluator": {"source": "ray"}}


def app(name: str, memshare: dict[str, Any], **more: Any) -> ServeApplicationSchema:
    fields = {"import_path": BUILD, "args": {"model": "m", "memshare": memshare}, **more}
    return ServeApplicationSchema(name=name, route_prefix=f"/{name}", **fields)


def named(namespace: str) -> dict[str, Any]:
    return {"evaluator": {"source": "ray", "namespace": namespace}}


@pytest.mark.parametrize(
    "other",
    [
        app("b", named("of-b")),
        app("b", {"evaluator": {"source": "in_process"}}),
        app("b", {**POOL, "mode": "off"}),
        app("b", {**POOL, "policy": {"name": "oldest"}}),
        app("b", {"evaluator": {"source": "ray", "address": "10.0.0.1:6379"}}),
        app("b", {"evaluator": {"source": "wrong"}}),
        app("b", POOL, import_path="shop.main:app"),
        app("b", POOL, runtime_env={"env_vars": {"MEMSHARE_EVALUATOR__NAMESPACE": "of-b"}}),
    ],
    ids=["own", "in process", "off", "no stages", "another Ray", "wrong", "foreign", "variable"],
)
def test_others_are_left_alone(other: ServeApplicationSchema) -> None:
    require_own_namespace(
        parse_cluster_args({"model": "m", "memshare": POOL}, {}), [app("a", POOL), other]
    )


def test_a_shared_namespace_is_refused_with_its_fix() -> None:
    mine = parse_cluster_args({"model": "m", "memshare": POOL}, {})
    with pytest.raises(ConfigError) as caught:
        require_own_namespace(mine, [app("a", POOL), app("b", named("memshare"))])
    text = str(caught.value)
    assert "memshare.evaluator.namespace = 'memshare': the applications a, b share it" in text
    assert "fix: give each a namespace of its own" in text
    away = parse_cluster_args({"model": "m", "memshare": named("of-c")}, {})
    require_own_namespace(away, [app("a", POOL), app("b", POOL), app("c", named("of-c"))])
