"""The evaluator pool under every kind of fault. No engine: the tests stand in for its thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from cluster.evaluator_pool import EvaluatorPool, RayCandidateSource, actor_name
from memshare.config import MemShareConfig, load_config
from memshare.search.bridge import EvaluatorBridge
from memshare.search.evaluate import EvaluatorAnswer, EvaluatorError, NewSteps

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_address")]

WAIT_S = 60.0  # generous: machines that run tests are busy
ROOT = Path(__file__).resolve().parents[2]


def make_config(**evaluator: object) -> MemShareConfig:
    """A pool of its own for each test."""
    settings = {
        "source": "ray",
        "namespace": f"test-{uuid.uuid4().hex[:8]}",
        "actors": 2,
        "cpus_per_actor": 0.1,
        "call_timeout_s": WAIT_S,
        "retry_after_s": 0.2,
        **evaluator,
    }
    return load_config({"policy": {"name": "paper"}, "evaluator": settings}, {})


def steps(history: str, tokens: range = range(20), position: int = 0) -> NewSteps:
    """One finished step."""
    array = list(tokens)
    return NewSteps(history, 0, history, position, array, (0, len(array)), 0.9, time.monotonic())


def wait_for(
    source: RayCandidateSource, count: int = 1, timeout_s: float = WAIT_S
) -> list[EvaluatorAnswer | EvaluatorError]:
    """What ``collect`` has returned when it has returned ``count`` items."""
    items: list[EvaluatorAnswer | EvaluatorError] = []
    end = time.monotonic() + timeout_s
    while len(items) < count and time.monotonic() < end:
        items += source.collect()
        time.sleep(0.01)
    return items


def actor_of(source: RayCandidateSource, history: str) -> str:
    return actor_name(source._index(source._key(history)))


def resume(source: RayCandidateSource, history: str) -> list[str]:
    """Submit until an answer comes; returns the reasons of the faults before."""
    reasons = []
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        source.submit([steps(history)])
        for item in wait_for(source):
            if isinstance(item, EvaluatorAnswer):
                return reasons
            reasons.append(item.reason)
        time.sleep(0.05)
    raise AssertionError(f"no answer in {WAIT_S} s, only {reasons}")


Impostor = Callable[[MemShareConfig, Callable[[object], object]], None]


@pytest.fixture
def impostor() -> Iterator[Impostor]:
    """Starts an actor under the name of the pool's actor 0 that answers with a given function."""
    alive: list[object] = []  # an actor ends with its handle

    def start(config: MemShareConfig, evaluate: Callable[[object], object]) -> None:
        class Evaluator:
            def evaluate(self, batch: object) -> object:
                return evaluate(batch)

            def forget_histories(self, histories: object, request_ids: object) -> None:
                pass

        pool = config.evaluator
        options = ray.remote(Evaluator).options(
            name=actor_name(0),
            namespace=pool.namespace,
            num_cpus=0,
            max_pending_calls=pool.max_pending_calls,
        )
        alive.append(options.remote())

    yield start
    alive.clear()


@pytest.fixture
def config() -> MemShareConfig:
    return make_config()


@pytest.fixture
def source(config: MemShareConfig) -> Iterator[RayCandidateSource]:
    source = RayCandidateSource(config)
    yield source
    source.close()


def test_similar_steps_are_found(source: RayCandidateSource) -> None:
    source.submit([steps("a"), steps("b", range(100, 120))])
    source.submit([steps("a", position=20), steps("b", range(200, 220), position=20)])
    answers = wait_for(source, 4 if actor_of(source, "a") != actor_of(source, "b") else 2)
    assert all(isinstance(a, EvaluatorAnswer) for a in answers)
    matches = [m for a in answers if isinstance(a, EvaluatorAnswer) for m in a.matches]
    assert [(m.later.request_id, m.later.start, m.earlier.start) for m in matches] == [("a", 20, 0)]
    assert source.pending == 0


def test_a_history_stays_with_one_actor(source: RayCandidateSource) -> None:
    histories = [f"request-{i}" for i in range(16)]
    assert len({actor_of(source, h) for h in histories}) == 2, "both actors should have work"
    for position in (0, 20):
        source.submit([steps(h, position=position) for h in histories])
    matches = [m for a in wait_for(source, 4) if isinstance(a, EvaluatorAnswer) for m in a.matches]
    assert sorted(m.later.request_id for m in matches) == sorted(histories)


def test_engines_do_not_see_the_steps_of_each_other(
    source: RayCandidateSource, config: MemShareConfig
) -> None:
    other = RayCandidateSource(config)
    for position in (0, 20):
        for engine in (source, other):
            engine.submit([steps("tenant", position=position)])
            matches = [
                m for a in wait_for(engine) if isinstance(a, EvaluatorAnswer) for m in a.matches
            ]
            assert len(matches) == (1 if position else 0)
    other.close()


def test_forgotten_histories_match_nothing(source: RayCandidateSource) -> None:
    source.submit([steps("a")])
    wait_for(source)
    source.forget_histories(["a"], ["another request"])
    source.submit([steps("a", position=20)])
    assert [a.matches for a in wait_for(source) if isinstance(a, EvaluatorAnswer)] == [()]


@pytest.mark.complete
def test_a_crashed_actor_comes_back(source: RayCandidateSource, config: MemShareConfig) -> None:
    assert resume(source, "a") == []
    actor = ray.get_actor(actor_of(source, "a"), config.evaluator.namespace)
    pid = ray.get(actor.__ray_call__.remote(lambda evaluator: os.getpid()))
    actor.__ray_call__.remote(lambda evaluator: time.sleep(3600))
    source.submit([steps("a")])
    os.kill(pid, signal.SIGKILL)
    (fault,) = wait_for(source)
    assert isinstance(fault, EvaluatorError)
    assert fault.reason == "dead"
    assert set(resume(source, "a")) <= {"dead"}
    again = ray.get_actor(actor_of(source, "a"), config.evaluator.namespace)
    assert again._actor_id == actor._actor_id, "Ray restarts it, nobody makes another"


@pytest.mark.complete
def test_actors_killed_for_good_are_made_again(
    source: RayCandidateSource, config: MemShareConfig
) -> None:
    histories = [f"request-{i}" for i in range(16)]
    for history in histories:
        resume(source, history)
    for name in {actor_of(source, history) for history in histories}:
        ray.kill(ray.get_actor(name, config.evaluator.namespace))
    for history in histories:
        assert set(resume(source, history)) <= {"dead"}


@pytest.mark.complete
def test_a_full_actor_pushes_back(impostor: Impostor) -> None:
    config = make_config(actors=1, max_pending_calls=2)
    impostor(config, lambda batch: time.sleep(3600))
    source = RayCandidateSource(config)
    for _ in range(6):
        source.submit([steps("a")])
    faults = source.collect()
    assert {f.reason for f in faults if isinstance(f, EvaluatorError)} == {"busy"}
    assert len(faults) + source.pending == 6


def test_a_silent_actor_times_out_and_is_left_alone(impostor: Impostor) -> None:
    config = make_config(actors=1, call_timeout_s=0.2, retry_after_s=3600)
    impostor(config, lambda batch: time.sleep(3600))
    source = RayCandidateSource(config)
    began = time.monotonic()
    source.submit([steps("a")])
    assert source.collect() == []
    assert time.monotonic() - began < 30, "neither call may wait for the actor"
    source.submit([steps("a")])
    faults = wait_for(source, 2)
    source.submit([steps("a")])
    faults += source.collect()
    assert [str(f).partition(" ")[0] for f in faults] == ["timeout:"] * 3
    assert str(faults[-1]).endswith("is left alone")
    assert source.pending == 0


@pytest.mark.parametrize("garbage", [None, 7, "text", EvaluatorAnswer((("no", "match"),), 0.0)])  # type: ignore[arg-type]
def test_garbage_is_not_taken_for_an_answer(impostor: Impostor, garbage: object) -> None:
    config = make_config(actors=1)
    impostor(config, lambda batch: garbage)
    source = RayCandidateSource(config)
    source.submit([steps("a")])
    (fault,) = wait_for(source)
    assert isinstance(fault, EvaluatorError)
    assert fault.reason == "garbage"


def test_an_evaluator_that_raises_is_an_error(impostor: Impostor) -> None:
    config = make_config(actors=1)
    impostor(config, lambda batch: 1 // 0)
    source = RayCandidateSource(config)
    source.submit([steps("a")])
    (fault,) = wait_for(source)
    assert isinstance(fault, EvaluatorError)
    assert fault.reason == "error"


@pytest.mark.complete
def test_the_pool_replaces_actors_that_are_gone(config: MemShareConfig) -> None:
    pool = EvaluatorPool(config)
    names = [actor_name(index) for index in range(2)]
    before = [ray.get_actor(name, config.evaluator.namespace) for name in names]
    ray.get([actor.ready.remote() for actor in before])
    ray.kill(before[1])
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        pool.check_health()
        after = [ray.get_actor(name, config.evaluator.namespace) for name in names]
        if after[1]._actor_id != before[1]._actor_id:
            break
        time.sleep(0.05)
    ray.get([actor.ready.remote() for actor in after])
    assert after[0]._actor_id == before[0]._actor_id


@pytest.mark.complete
def test_the_engine_side_never_waits_and_sees_sharing_resume() -> None:
    """Through the engine's bridge: crash, loss of all actors; only reasons tell."""
    config = make_config(actors=2)
    pool = EvaluatorPool(config)
    ray.get([pool._directory.find(index).ready.remote() for index in range(2)])
    bridge = EvaluatorBridge(lambda: RayCandidateSource(config), queue_size=64)
    reasons: set[str] = set()
    slowest = 0.0

    def exchange() -> int:
        nonlocal slowest
        began = time.perf_counter()
        bridge.submit([steps(f"request-{time.monotonic_ns() % 7}")])
        items = bridge.drain()
        slowest = max(slowest, time.perf_counter() - began)
        reasons.update(i.reason for i in items if isinstance(i, EvaluatorError))
        return sum(isinstance(i, EvaluatorAnswer) for i in items)

    def run_until_answered(answers: int) -> None:
        end = time.monotonic() + WAIT_S
        while answers > 0:
            assert time.monotonic() < end, f"no answers; faults: {reasons}"
            answers -= exchange()
            time.sleep(0.01)

    run_until_answered(10)
    assert reasons == set()
    ray.kill(ray.get_actor(actor_name(0), config.evaluator.namespace), no_restart=False)
    run_until_answered(20)
    for index in range(2):
        ray.kill(ray.get_actor(actor_name(index), config.evaluator.namespace))
    run_until_answered(20)
    bridge.close()
    # While an actor restarts, calls may wait for it up to its limit.
    assert {"dead"} <= reasons <= {"dead", "busy"}
    assert slowest < WAIT_S / 4, "the engine's side must not wait for Ray"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379"])
def test_an_address_without_a_cluster_is_reported_at_once(address: str) -> None:
    config = make_config(address=address)
    program = textwrap.dedent(
        f"""
        from cluster.evaluator_pool import RayCandidateSource
        from memshare.config import MemShareConfig
        RayCandidateSource(MemShareConfig.model_validate_json({config.model_dump_json()!r}))
        """
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert f"EvaluatorError: dead: no Ray cluster at '{address}'" in outcome.stderr


@pytest.mark.complete
def test_a_process_outside_ray_joins_makes_the_pool_and_takes_it_along(ray_address: str) -> None:
    """As vLLM's engine process does: no Ray in it, only an address."""
    config = make_config(actors=1, address=ray_address)
    program = textwrap.dedent(
        f"""
        import signal, sys, time
        from cluster.evaluator_pool import RayCandidateSource
        from memshare.config import MemShareConfig
        from memshare.search.evaluate import EvaluatorAnswer, NewSteps

        handler = lambda *_: sys.exit(42)
        signal.signal(signal.SIGTERM, handler)
        config = MemShareConfig.model_validate_json({config.model_dump_json()!r})
        source = RayCandidateSource(config)
        assert signal.getsignal(signal.SIGTERM) is handler
        source.submit([NewSteps("a", 0, "a", 0, list(range(9)), (0, 9), 0.9, 0.0)])
        while not (answers := source.collect()):
            time.sleep(0.01)
        assert isinstance(answers[0], EvaluatorAnswer), answers
        print("answered", flush=True)
        time.sleep(3600)
        """
    )
    environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "answered\n"
        ray.get_actor(actor_name(0), config.evaluator.namespace)
        process.send_signal(signal.SIGKILL)
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            try:
                ray.get_actor(actor_name(0), config.evaluator.namespace)
            except ValueError:
                return
            time.sleep(0.1)
        raise AssertionError("the actor outlives the process that made it")
    finally:
        process.kill()
        process.wait()
