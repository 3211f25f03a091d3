"""Other applications of the same Ray Serve: what this one must not share with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from ray.serve.schema import ServeApplicationSchema

from cluster.config import ClusterArgs, parse_cluster_args
from cluster.processes.controller import ask_controller
from memshare.config import ConfigError

BUILD = "cluster.app:build"
"""``import_path`` of an application."""


def require_own_namespace_in_cluster(cluster: ClusterArgs) -> None:
    """The same, for an application that is built where Ray Serve's controller can be asked.

    Raises:
        ConfigError: see :func:`require_own_namespace`.
    """
    if not cluster.uses_pool:
        return
    # What was deployed last as a file, the one that is being built included.
    answers = ask_controller("get_app_configs")
    if answers is not None:
        applications: Mapping[str, ServeApplicationSchema] = answers[0]
        require_own_namespace(cluster, applications.values())


def require_own_namespace(
    cluster: ClusterArgs, applications: Iterable[ServeApplicationSchema]
) -> None:
    """Refuse an application whose evaluators would be another one's.

    Actors are found by their names, so that one application would use, restart and end the
    other's, under the other's configuration.

    Args:
        cluster: the application's arguments.
        applications: all of its Ray Serve config file, itself included.

    Raises:
        ConfigError: another one has the same ``evaluator.namespace``.
    """
    if not cluster.uses_pool:
        return
    mine = _place(cluster)
    sharers = [app.name for app in applications if _pool_of(app) == mine]
    if len(sharers) > 1:
        namespace = cluster.memshare.evaluator.namespace
        raise ConfigError(
            f"memshare.evaluator.namespace = {namespace!r}: the applications "
            f"{', '.join(sharers)} share it, and would use each other's evaluators\n"
            "    fix: give each a namespace of its own, such as its name, or set "
            "memshare.evaluator.source to 'in_process'"
        )


def _place(cluster: ClusterArgs) -> tuple[str | None, str]:
    return cluster.memshare.evaluator.address, cluster.memshare.evaluator.namespace


def _pool_of(app: ServeApplicationSchema) -> tuple[str | None, str] | None:
    """Where an application's evaluators are; None if it has none."""
    if app.import_path != BUILD:
        return None
    variables = (app.runtime_env or {}).get("env_vars", {})
    try:
        cluster = parse_cluster_args(app.args, {**os.environ, **variables})
    except ConfigError:
        return None  # it is refused when it is built itself
    return _place(cluster) if cluster.uses_pool else None
