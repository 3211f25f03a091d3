"""Adapters that share one cache, in engines and servers with processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.memshare.engine.agents.served import TIGHT, Roles, Served, changed_copy, words
from tests.memshare.engine.harness import Engine
from tests.memshare.engine.server import serving
from tools.bench.local_cluster import free_port

pytestmark = [pytest.mark.engine, pytest.mark.complete, pytest.mark.timeout(900)]


Ended = tuple[str | None, int, int | None]
"""Why a request ended, with how many tokens of output, and how many it found."""


def ask_with_strangers(roles: Roles, changed: Path) -> list[list[Ended]]:
    """Runs in a process of its own, so that its engine has one, too: good requests, and batches of
    a good one, one that is made up, and one of the base model."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    engine = Engine(str(roles.base), roles.options("base_lr_shared"), **TIGHT)
    served = Served(engine, roles.alike)
    prompt = TokensPrompt(prompt_token_ids=words(15, 100))
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    plan, act, reflect = map(served.lora, ("plan", "act", "reflect"))
    asked = [
        [plan],
        [act, LoRARequest("stranger", 7, plan.lora_path), None],
        [act, LoRARequest("plan", 1, str(changed)), None],
        [act, LoRARequest("reflect", 3, str(changed / "nowhere")), None],
        [reflect, LoRARequest("plan", 7, plan.lora_path)],
    ]
    answers = []
    for loras in asked:
        outputs = engine.llm.generate(
            [prompt] * len(loras), params, use_tqdm=False, lora_request=loras
        )
        choices = [(output.outputs[0], output.num_cached_tokens) for output in outputs]
        answers.append([(c.finish_reason, len(c.token_ids), found) for c, found in choices])
    engine.close()
    return answers


def test_a_made_up_request_ends_alone(roles: Roles, tmp_path: Path) -> None:
    """Whatever is wrong with its adapter; everybody else is served on, in the same batch, too."""
    changed = changed_copy(roles.alike["plan"], tmp_path / "plan")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        first, *batches, last = pool.submit(ask_with_strangers, roles, changed).result()
    assert first == [("length", 6, 0)]
    for act, made_up, base in batches:
        assert made_up[:2] == ("error", 0)
        assert act == ("length", 6, 96)
        assert base[:2] == ("length", 6)
    assert last == [("length", 6, 96)] * 2


def test_a_live_server(roles: Roles, tmp_path: Path) -> None:
    """Roles are models of the OpenAI interface, in processes of their own. Nobody else finds their
    blocks, and nothing that changed can be loaded into them."""
    port = free_port()
    config = tmp_path / "agents.json"
    config.write_text(json.dumps(roles.options("base_lr_shared")))
    changed = changed_copy(roles.alike["reflect"], tmp_path / "changed")
    command = [
        "memshare.cli.main", "serve", str(roles.base), "--memshare", str(config),
        "--served-model-name=base", f"--port={port}", "--dtype=float32", "--block-size=32",
        "--max-model-len=512", "--num-gpu-blocks-override=60", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    runtime = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with serving(command, port, tmp_path, **runtime) as (url, process):
        models = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
        assert {model["id"] for model in models} == {"base", "plan", "act", "reflect"}

        def found(model: str, text: list[int], **options: Any) -> int:
            body = {"model": model, "prompt": text, "max_tokens": 5, **options}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            details = answer.json()["usage"]["prompt_tokens_details"] or {}
            return int(details.get("cached_tokens") or 0)

        text = words(1, 100)
        assert [found(model, text) for model in ("plan", "act", "reflect")] == [0, 96, 96]
        assert found("base", text) == 0
        assert [found("act", text, cache_salt="tenant") for _ in range(2)] == [0, 96]
        load = {"lora_name": "reflect", "lora_path": str(changed), "load_inplace": True}
        for body in (load, load | {"lora_name": "stranger"}):
            answer = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=120)
            assert answer.status_code >= 400, answer.text
        again = str(shutil.copytree(roles.alike["act"], tmp_path / "again"))
        for call, body in (
            ("unload", {"lora_name": "act"}), ("load", {"lora_name": "act", "lora_path": again}),
        ):  # fmt: skip
            answer = httpx.post(f"{url}/v1/{call}_lora_adapter", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            status = httpx.post(
                f"{url}/v1/completions", json={"model": "act", "prompt": text}, timeout=120
            ).status_code
            assert status == (404 if call == "unload" else 200)
        assert found("act", text) == 96, "the same adapter under another number"
        for model in ("stranger", "memshare-family"):
            body = {"model": model, "prompt": text, "max_tokens": 5}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=120).status_code == 404
        assert found("reflect", text) == 96, "what was loaded goes on"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
