"""``serve run configs/cluster.yaml``, a real model and real clients. One server for this folder.

The files are in the order of the server's life: the last one shuts it down.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.support.collector import Collector
from tests.cluster.support.loose import LOOSE
from tests.machine import DTYPE
from tools.bench.local_cluster import (
    Server,
    cluster_file,
    memshare_in,
    running_server,
)


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.stop()


@pytest.fixture(scope="package")
def server(
    ray_address: str, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    document = cluster_file()
    memshare_in(document).update(LOOSE)
    memshare_in(document)["logs"] = {"format": "json", "explain_every_s": 1.0}
    arguments = document["applications"][0]["args"]
    arguments["page"] = {"show_text": True}
    arguments["replica"]["body_timeout_s"] = 4.0
    arguments["auth"] = {"without_keys": {"requests_per_connection": 24}}
    arguments["engine"]["dtype"] = DTYPE
    arguments["engine"]["extra"] = {"otlp_traces_endpoint": collector.url}
    with running_server(tmp_path_factory.mktemp("serve"), document) as server:
        yield server
