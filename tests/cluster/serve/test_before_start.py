"""A file that is wrong, before there is a server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tools.bench.local_cluster import (
    START_S,
    cluster_file,
    processes,
    start,
    stop,
)

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


@pytest.mark.usefixtures("ray_address")
def test_a_wrong_file_says_what_to_do_before_anything_is_loaded(tmp_path: Path) -> None:
    document = cluster_file()
    document["applications"][0]["args"]["engine"]["max_seqs"] = 8
    server = start(tmp_path, document)
    try:
        end = time.monotonic() + START_S
        while "did you mean 'max_num_seqs'?" not in server.log.read_text():
            assert time.monotonic() < end, server.log.read_text()[-4000:]
            assert processes("VLLM::") == []
            time.sleep(0.2)
    finally:
        stop(server)
