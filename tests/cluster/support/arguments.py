"""Arguments of the application, given or from a file of ``configs/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cluster.config import (
    ClusterArgs,
    parse_cluster_args,
)

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def parse(**args: object) -> ClusterArgs:
    return parse_cluster_args({"model": "some/model", **args}, environ={})


def application(name: str) -> dict[str, Any]:
    """The arguments in a Ray Serve config file."""
    (application,) = yaml.safe_load((CONFIGS / name).read_text())["applications"]
    assert application["import_path"] == "cluster.app:build"
    arguments: dict[str, Any] = application["args"]
    return arguments
