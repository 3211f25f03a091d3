"""Adapters that share one cache, in real engines: exactness against peft and against a reference of
each scheme, and who finds whose blocks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.memshare.agents.reference import Reference, Rows
from tests.memshare.engine.agents.served import (
    TIGHT,
    TOLERANCE,
    WRONG,
    Ask,
    Roles,
    Said,
    Served,
    changed_copy,
    distance,
    peft_distance,
    whole_blocks,
    words,
)
from tests.memshare.engine.harness import BLOCK, StartEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

TURNS = ("plan", "act", "reflect", "plan")


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
    served.ask(Ask(text, "act", salt="to load it"))  # which writes its columns
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


def test_a_wrong_family_key_would_be_noticed(
    served: Served, reference: Reference, scheme: str
) -> None:
    """Control: under two keys agents find nothing of each other's. With one key for two families
    they find what another A matrix has made, and answers are wrong; with its own key they do not,
    and answers are right."""
    if scheme == "full_shared":
        pytest.skip("there are no A matrices")
    from memshare.engine.vllm_0_32.family_hashes import FamilyHasher, family_hasher

    core = served.engine.core
    layers = core.model_executor.driver_worker.worker.model_runner.get_model().model.layers
    ours = core.request_block_hasher
    theirs = family_hasher(ours.hasher, "key of another family", ours.admit)

    def read_by_another_family(text: list[int], hasher: FamilyHasher) -> None:
        """As if a family whose A matrices are others had read it."""
        kept = [layer.self_attn.value_down.clone() for layer in layers]
        core.request_block_hasher = hasher
        for layer, down in zip(layers, kept, strict=True):
            layer.self_attn.value_down.copy_(down.roll(1, dims=1))
        served.ask(Ask(text, "plan"))
        core.request_block_hasher = ours
        for layer, down in zip(layers, kept, strict=True):
            layer.self_attn.value_down.copy_(down)

    ask = Ask([*words(19, 100), *words(20, 9)], "act")
    served.ask(Ask(words(19, 100), "plan"))
    core.request_block_hasher = theirs
    (said,) = served.ask(ask)
    core.request_block_hasher = ours
    assert said.cached == 0, "the right text under another key"
    assert served.ask(ask)[0].cached == 96

    for seed, hasher, found in ((21, theirs, 0), (22, ours, 96)):
        text = words(seed, 100)
        read_by_another_family(text, hasher)
        (said,) = served.ask(ask := Ask([*text, *words(23, 9)], "act"))
        assert said.cached == found
        cache = reference.run(text, "plan")[1] if found else None
        far, _ = distance(reference, ask, said, cache)
        assert (far > WRONG) if hasher is ours else (far < TOLERANCE)


def test_an_adapter_that_has_changed_does_not_load(
    served: Served, roles: Roles, scheme: str, tmp_path: Path
) -> None:
    """Under its own name or another; and what is loaded goes on."""
    from vllm.lora.request import LoRARequest

    changed = str(changed_copy(roles.adapters(scheme)["plan"], tmp_path / "plan"))
    text = words(12, 70)
    (before,) = served.ask(Ask(text, "plan", salt="before"))
    ours = served.lora("plan").lora_int_id
    for name, number, in_place, what in (
        ("plan", ours, True, "not what it was when"),
        ("plan", 77, False, "not what it was when"),
        ("stranger", 78, False, "none of those that share"),
    ):
        with pytest.raises(ValueError, match=what):
            served.engine.core.add_lora(LoRARequest(name, number, changed, load_inplace=in_place))
    (after,) = served.ask(Ask(text, "plan", salt="after"))
    assert (after.tokens, after.logprobs) == (before.tokens, before.logprobs)


def test_an_adapter_is_loaded_again(
    served: Served, reference: Reference, roles: Roles, scheme: str, tmp_path: Path
) -> None:
    """Servers number adapters anew with each load: it is the same to blocks and slots, whatever its
    number, also another's; and removing it leaves it where it is."""
    from vllm.lora.request import LoRARequest

    core = served.engine.core
    text = words(18, 75)
    served.ask(*(Ask(text, name, salt=f"load-{name}") for name in TURNS))
    loaded = core.list_loras()
    assert len(loaded) == 3
    again = Path(shutil.copytree(roles.adapters(scheme)["act"], tmp_path / "act"))
    assert core.add_lora(LoRARequest("act", 77, str(again), load_inplace=True))
    assert not core.remove_lora(served.lora("plan").lora_int_id)
    assert core.list_loras() == loaded
    _, cache = distance(reference, ask := Ask(text, "plan"), served.ask(ask)[0])
    for number, in_place in ((77, True), (served.lora("plan").lora_int_id, False)):
        lora = LoRARequest("act", number, str(again), load_inplace=in_place)
        # With `plan` in one batch, whose number it has the second time.
        said, _ = served.ask(ask := Ask(text, "act"), Ask(text, "plan"), loras={"act": lora})
        assert said.cached == 64
        far, _ = distance(reference, ask, said, cache)
        assert (far > WRONG) if scheme == "full_shared" else (far < TOLERANCE)
    weights = again / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert served.ask(Ask(text, "act"), loras={"act": lora})[0].cached == 64, "nothing is read anew"
    if scheme != "full_shared":
        assert distance(reference, Ask(text, "plan"), said, cache)[0] > WRONG, "control"


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
