"""Adapters that share one cache, in real engines: exactness against peft and against a reference of
each scheme, and who finds whose blocks."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.memshare.agents.reference import Reference, Rows
from tests.memshare.engine.agents.served import (
    TOLERANCE,
    Ask,
    Roles,
    Said,
    Served,
    distance,
    whole_blocks,
    words,
    write_roles,
)
from tests.memshare.engine.harness import BLOCK, Engine, StartEngine
from tests.memshare.engine.server import serving
from tools.bench.local_cluster import free_port

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

WRONG = 0.01
"""Of log-probabilities: what a wrong matrix or a wrong column must exceed."""
TURNS = ("plan", "act", "reflect", "plan")
# Prompts come in pieces, and a batch of conversations does not fit.
TIGHT: dict[str, Any] = {
    "max_num_batched_tokens": 64, "num_gpu_blocks_override": 25, "max_num_seqs": 8,
    "dtype": "float32", "max_model_len": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    return write_roles(tmp_path_factory.mktemp("roles"))


@pytest.fixture(
    scope="module",
    params=["base_lr_shared", "stacked", pytest.param("full_shared", marks=pytest.mark.complete)],
)
def scheme(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def served(scheme: str, roles: Roles, start_engine: StartEngine) -> Iterator[Served]:
    with start_engine(str(roles.base), roles.options(scheme), **TIGHT) as engine:
        yield Served(engine, roles.adapters(scheme))


@pytest.fixture
def reference(scheme: str, roles: Roles) -> Reference:
    return roles.reference(scheme)


def peft_distance(roles: Roles, adapters: dict[str, Path], ask: Ask, said: Said) -> float:
    """How far an answer is from what peft says of the same text."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(roles.base, dtype=torch.float32)
    if ask.adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapters[ask.adapter]))
    with torch.no_grad():
        logits = model(torch.tensor([[*ask.prompt, *said.tokens[:-1]]])).logits[0]
    steps = logits[len(ask.prompt) - 1 :].log_softmax(-1)
    gaps = [
        abs(float(step[token]) - logprob)
        for step, token, logprob in zip(steps, said.tokens, said.logprobs, strict=True)
    ]
    return max(gaps)


def converse(served: Served, reference: Reference) -> Iterator[tuple[str, int, int, float]]:
    """Agents take turns over one growing context, while others press for memory.

    Yields:
        Who, how many tokens could have been found, how many were, and how far it was off.
    """
    context, cache, known = words(1, 100), None, 0
    for turn, name in enumerate(TURNS):
        ask = Ask(context, name, tokens=24)
        others = [
            Ask(words(100 * turn + i, 90), adapter, tokens=40, salt=f"other-{turn}-{i}")
            for i, adapter in enumerate([None, "act", "plan", "reflect", None])
        ]
        said, *answers = served.ask(ask, *others)
        far, cache = distance(reference, ask, said, cache if said.cached else None)
        yield name, known, said.cached, far
        for other, answer in zip(others, answers, strict=True):
            assert answer.cached == 0
            assert distance(reference, other, answer)[0] < TOLERANCE
        known = whole_blocks(len(context) + len(said.tokens) - 1)
        context = [*context, *said.tokens, *words(50 + turn, 13)]


def test_each_adapter_alone_is_what_peft_says(served: Served, roles: Roles, scheme: str) -> None:
    """In one batch, with the base model among them, and whole prompts in pieces."""
    asks = [
        Ask(words(i, 40 + 30 * i), adapter, salt=f"alone-{i}")
        for i, adapter in enumerate([None, "plan", "act", "reflect", None])
    ]
    for ask, said in zip(asks, served.ask(*asks), strict=True):
        assert said.cached == 0
        assert peft_distance(roles, roles.adapters(scheme), ask, said) < TOLERANCE
    plan, act = asks[1], Ask(asks[1].prompt, "act", salt="again")
    (said,) = served.ask(plan)
    assert peft_distance(roles, roles.adapters(scheme), act, said) > WRONG, "control: wrong adapter"


def test_turns_over_a_growing_context(served: Served, reference: Reference, scheme: str) -> None:
    """Each agent reads what the others have written, in whole blocks, and is what the scheme says;
    sharing everything is not."""
    before = served.engine.metric("vllm:num_preemptions")
    offs = []
    for turn, (_, known, cached, far) in enumerate(converse(served, reference)):
        assert cached <= known
        assert (cached >= BLOCK) == (turn > 0)
        offs.append(far)
    assert served.engine.metric("vllm:num_preemptions") > before
    if scheme == "full_shared":
        assert offs[0] < TOLERANCE
        assert max(offs[1:]) > WRONG  # a turn may have found its own blocks alone
    else:
        assert max(offs) < TOLERANCE


def test_a_switch_of_roles_finds_every_whole_block(
    served: Served, reference: Reference, scheme: str
) -> None:
    """With memory enough, also what was generated; whoever wrote a block, it is read as the scheme
    says."""
    context, cache, known = words(7, 75), None, 0
    for turn, name in enumerate(TURNS):
        ask = Ask(context, name, tokens=25)
        (said,) = served.ask(ask)
        assert said.cached == known
        far, cache = distance(reference, ask, said, cache)
        assert (far > WRONG) if scheme == "full_shared" and turn else (far < TOLERANCE)
        known = whole_blocks(len(context) + len(said.tokens) - 1)
        context = [*context, *said.tokens, *words(len(context), 9)]


def test_what_is_found_of_others_is_counted(served: Served) -> None:
    """On the metrics, by who reads it, and in a request's usage."""
    side = served.engine.scheduler.connector.family_side
    names = ("agent_tokens_found", "agent_tokens_shared")

    def counted() -> list[int]:
        return [
            side.counters.totals[f"{name}:{role}"] for role in ("plan", "act") for name in names
        ]

    text = words(16, 75)
    before = counted()
    for role, found, shared in (("plan", 0, 0), ("act", 64, 64), ("plan", 64, 0)):
        said = served.ask(Ask(text, role, tokens=25))[0]
        usage = {"blocks_shared": 0, "tokens_dropped": 0, "peak_kv_blocks": 4, "preemptions": 0}
        assert said.usage == usage | {"tokens_shared": shared}
        assert said.cached == found
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [64, 0, 64, 64]
    for name in names:
        total = sum(count for key, count in side.counters.totals.items() if key.startswith(name))
        assert served.engine.metric(f"vllm:memshare_{name}") == total
    assert served.ask(Ask(text))[0].usage["tokens_shared"] == 0, "the base model's"


def test_bytes_of_low_rank_columns(served: Served, scheme: str) -> None:
    """Of 25 blocks of 32 tokens, 2 layers with 2 heads of 32 in float32: heads of 40 would do, and
    are padded to 64 on CPUs, keys with them."""
    served.ask(Ask(words(17, 40), "plan"))  # a step reports them
    cache = served.engine.core.vllm_config.cache_config
    widened = cache.num_gpu_blocks * 32 * 2 * 2 * (64 + 64 - 2 * 32) * 4
    wanted = 0 if scheme == "full_shared" else widened
    assert served.engine.metric("vllm:memshare_low_rank_bytes") == wanted


def test_nobody_else_finds_them(served: Served) -> None:
    """Other tenants, and the base model."""
    text = words(8, 100)
    served.ask(Ask(text, "plan", salt="tenant-1"))
    for adapter, salt, found in (
        ("plan", "tenant-1", 96), ("act", "tenant-1", 96), ("act", "tenant-2", 0),
        ("act", None, 0), (None, "tenant-1", 0), (None, None, 0),
    ):  # fmt: skip
        (said,) = served.ask(Ask(text, adapter, salt=salt))
        assert said.cached == found, (adapter, salt)


def test_the_base_models_blocks_are_its_own(served: Served, roles: Roles, scheme: str) -> None:
    text = words(9, 100)
    (first,), (again,) = served.ask(Ask(text)), served.ask(Ask(text))
    assert (first.cached, again.cached) == (0, 96)
    assert peft_distance(roles, {}, Ask(text), again) < TOLERANCE
    (said,) = served.ask(Ask(text, "plan"))
    assert said.cached == 0
    assert peft_distance(roles, roles.adapters(scheme), Ask(text, "plan"), said) < TOLERANCE


def test_columns_of_others_would_be_noticed(
    served: Served, reference: Reference, scheme: str
) -> None:
    """Control: a reader that takes the columns beside its own, or another's B matrices."""
    if scheme == "full_shared":
        pytest.skip("there are no columns")
    runner = served.engine.core.model_executor.driver_worker.worker.model_runner
    columns = runner.get_model().model.layers[0].self_attn.slot_columns
    text = words(10, 100)
    served.ask(Ask(text, "plan"))
    kept = columns.clone()
    columns.copy_(kept.roll(1, dims=1))
    ask = Ask([*text, *words(11, 9)], "act")
    (said,) = served.ask(ask)
    columns.copy_(kept)
    assert said.cached == 96
    cache: list[Rows] = reference.run(text, "plan")[1]
    assert distance(reference, ask, said, cache)[0] > WRONG
    served.engine.scheduler.reset_prefix_cache()
    served.ask(Ask(text, "plan"))
    (said,) = served.ask(ask)
    assert distance(reference, ask, said, cache)[0] < TOLERANCE
    others = reference.adapters["act"].up
    for layer in (0, 1):
        others[layer, "v_proj"] = others[layer, "v_proj"].roll(1, dims=0)
    assert distance(reference, ask, said, cache)[0] > WRONG


def test_an_adapter_that_has_changed_does_not_load(
    served: Served, roles: Roles, scheme: str, tmp_path: Path
) -> None:
    """Under its own name or another; and what is loaded goes on."""
    from vllm.lora.request import LoRARequest

    changed = tmp_path / "plan"
    shutil.copytree(roles.adapters(scheme)["plan"], changed)
    weights = changed / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"] *= 1.01
    save_file(tensors, weights)
    text = words(12, 70)
    (before,) = served.ask(Ask(text, "plan", salt="before"))
    core = served.engine.core
    ids = served.lora("plan").lora_int_id
    for request, what in (
        (LoRARequest("plan", ids, str(changed), load_inplace=True), "not what it was when"),
        (LoRARequest("plan", 77, str(roles.adapters(scheme)["plan"])), f"with the id {ids}"),
        (LoRARequest("stranger", 78, str(changed)), "none of those that share"),
    ):
        with pytest.raises(ValueError, match=what):
            core.add_lora(request)
    (after,) = served.ask(Ask(text, "plan", salt="after"))
    assert (after.tokens, after.logprobs) == (before.tokens, before.logprobs)


@pytest.mark.complete
def test_one_stacked_adapter_is_what_vllm_serves(roles: Roles, start_engine: StartEngine) -> None:
    """Alone in its family an adapter loses nothing: the same tokens from a growing context."""
    said: dict[str, list[Said]] = {}
    for scheme in ("nonshared", "stacked"):
        options = roles.options(scheme, "act")
        with start_engine(str(roles.base), options, **TIGHT) as engine:
            served = Served(engine, roles.adapters(scheme))
            context, answers = words(13, 90), []
            for turn in range(4):
                answers += served.ask(Ask(context, "act", tokens=20), Ask(words(turn, 50)))
                context = [*context, *answers[-2].tokens, *words(20 + turn, 11)]
            said[scheme] = answers
    for plain, stacked in zip(*said.values(), strict=True):
        assert (stacked.tokens, stacked.cached) == (plain.tokens, plain.cached)
        assert stacked.logprobs == pytest.approx(plain.logprobs, abs=TOLERANCE)


@pytest.mark.complete
def test_turns_on_two_ranks(
    roles: Roles, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has all columns, and the rows of B that belong to its heads."""
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(2))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    options = TIGHT | {"tensor_parallel_size": 2}
    with start_engine(str(roles.base), roles.options("stacked"), **options) as engine:
        turns = converse(Served(engine, roles.apart), roles.reference("stacked"))
        for turn, (_, _, cached, far) in enumerate(turns):
            assert (cached >= BLOCK) == (turn > 0)
            assert far < TOLERANCE


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
        [act, LoRARequest("plan", 7, plan.lora_path), None],
        [act, LoRARequest("plan", 1, str(changed)), None],
        [act, LoRARequest("reflect", 3, str(changed / "nowhere")), None],
        [reflect, plan],
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


@pytest.mark.complete
def test_a_made_up_request_ends_alone(roles: Roles, tmp_path: Path) -> None:
    """Whatever is wrong with its adapter; everybody else is served on, in the same batch, too."""
    changed = Path(shutil.copytree(roles.alike["plan"], tmp_path / "plan"))
    weights = changed / "adapter_model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        first, *batches, last = pool.submit(ask_with_strangers, roles, changed).result()
    assert first == [("length", 6, 0)]
    for act, made_up, base in batches:
        assert made_up[:2] == ("error", 0)
        assert act == ("length", 6, 96)
        assert base[:2] == ("length", 6)
    assert last == [("length", 6, 96)] * 2


@pytest.mark.complete
def test_a_live_server(roles: Roles, tmp_path: Path) -> None:
    """Roles are models of the OpenAI interface, in processes of their own. Nobody else finds their
    blocks, and nothing that changed can be loaded into them."""
    port = free_port()
    config = tmp_path / "agents.json"
    config.write_text(json.dumps(roles.options("base_lr_shared")))
    changed = tmp_path / "changed"
    shutil.copytree(roles.alike["reflect"], changed)
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
        weights = changed / "adapter_model.safetensors"
        tensors = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
        save_file(tensors, weights)
        for body in (load, load | {"lora_name": "stranger"}):
            answer = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=120)
            assert answer.status_code >= 400, answer.text
        for model in ("stranger", "memshare-family"):
            body = {"model": model, "prompt": text, "max_tokens": 5}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=120).status_code == 404
        assert found("reflect", text) == 96, "what was loaded goes on"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
