"""The end of a server."""

from __future__ import annotations

import os
import re

import psutil
import pytest
import ray

from cluster.evaluator_pool import actor_name
from memshare.client import NotFoundError
from tests.cluster.serve.support import GREEDY, QUESTION, guards
from tests.cluster.support.faults import Old
from tools.bench.local_cluster import Server, processes, stop

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


def test_shutdown_leaves_nothing_behind(server: Server) -> None:
    evaluator = ray.get_actor(actor_name(0), "memshare")
    pid = ray.get(evaluator.__ray_call__.remote(lambda _: os.getpid()))
    ours = [*processes("VLLM::", "ray::ServeReplica"), *guards(), psutil.Process(pid)]
    titles = {process.cmdline()[0] for process in ours}
    old = Old.of("engine", "worker", "replica")
    assert {"VLLM::EngineCore", "ray::ServeReplica:memshare:Engine", "/bin/sh"} <= titles
    server.client.chat.completions.create(model="smollm2", messages=QUESTION, max_tokens=1)
    with server.grpc_client() as client:
        client.chat([("user", "Hello")], GREEDY)
        with pytest.raises(NotFoundError):
            client.chat([("user", "Hello")], GREEDY, model="nobody")
    stop(server)
    assert server.process.returncode == 0
    log = server.log.read_text()
    assert re.search(r"-- POST /v1/chat/completions 200 tenant=local \d+", log), "what was asked"
    assert re.search(r"-- gRPC /memshare.v1.MemShare/Chat OK tenant=local request=grpc-", log)
    assert "CALL report" not in log, "what replicas tell the page every second is not"
    assert "gRPCStatusError" not in log, "a call that was refused is one line"
    gone, alive = psutil.wait_procs(ours, timeout=90)
    assert alive == []
    assert len(gone) == len(ours)
    old.assert_gone()
