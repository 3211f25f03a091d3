"""Which replica a request goes to."""

from __future__ import annotations

import hashlib
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import RoutingConfig
from cluster.routing.choice import Routing
from cluster.routing.load import Load, LoadMeter, from_stats, to_stats
from cluster.routing.ring import Ring

NAMES = st.sets(st.text("abcdef", min_size=1, max_size=6), min_size=1, max_size=12)


def load(used: float, running: int, waiting: int = 0, slots: int = 64) -> Load:
    return Load(used, running, waiting, slots, preemptions=0)


def routing(replicas: int, **config: object) -> Routing:
    made = Routing(RoutingConfig.model_validate(config), Random(1))
    made.set_replicas([f"r{i}" for i in range(replicas)])
    return made


def unknown(_: str) -> int | None:
    return None


def first(made: Routing, session: str = "", ongoing: dict[str, int] | None = None) -> str:
    ranks = made.rank(session, (ongoing or {}).get)
    return ranks[0][0]


# ---- load ----


def test_a_load_of_one_is_all_that_the_replica_has() -> None:
    assert load(0.5, running=4).demand == 0.5
    assert load(1.0, running=4, waiting=4).demand == 2.0, "those that wait want blocks, too"
    assert load(0.1, running=64, waiting=32).demand == 1.5, "slots are scarcer than blocks"
    assert load(0.0, running=0).demand == 0
    assert load(0.0, running=0, waiting=2).waiting_share == 1


@given(st.builds(load, st.floats(0, 1), st.integers(0, 64), st.integers(0, 999)))
def test_stats_carry_a_load(one: Load) -> None:
    assert from_stats(to_stats(one)) == one._replace(used=round(one.used, 3))
    assert from_stats({}) is None


def test_preemptions_are_forgotten_after_a_minute() -> None:
    now = 0.0
    meter = LoadMeter(clock=lambda: now)
    meter.preempted(3)
    assert meter.read() is None, "no step yet"
    meter.record(used=0.9, running=2, waiting=1, slots=8)
    now = 30.0
    meter.preempted(2)
    meter.preempted(0)
    now = 59.0
    assert meter.read() == Load(0.9, 2, 1, 8, 5)
    now = 61.0
    assert meter.read() == Load(0.9, 2, 1, 8, 2)
    now = 91.0
    assert meter.read() == Load(0.9, 2, 1, 8, 0)


# ---- sessions ----


@given(NAMES, st.text(max_size=8))
def test_a_walk_visits_every_member_once(members: set[str], key: str) -> None:
    assert sorted(Ring(members).walk(key)) == sorted(members)


@given(NAMES, st.text(max_size=8), st.data())
def test_a_part_of_a_ring_is_the_ring_of_the_part(
    members: set[str], key: str, data: st.DataObject
) -> None:
    some = data.draw(st.sets(st.sampled_from(sorted(members))))
    assert list(Ring(members).part(some).walk(key)) == list(Ring(some).walk(key))


@given(NAMES, st.text(max_size=8), st.data())
def test_a_key_moves_only_if_its_home_goes(
    members: set[str], key: str, data: st.DataObject
) -> None:
    before = list(Ring(members).walk(key))
    gone = data.draw(st.sampled_from(sorted(members)))
    after = list(Ring(members - {gone}).walk(key))
    assert after == [member for member in before if member != gone]


@given(st.lists(st.sets(st.sampled_from("abcdef")), max_size=5), st.text(max_size=8))
def test_a_ring_does_not_remember_who_was_there(history: list[set[str]], key: str) -> None:
    ring = Ring()
    for members in history:
        ring.update(members)
        assert list(ring.walk(key)) == list(Ring(members).walk(key))


def test_homes_are_spread_evenly() -> None:
    ring = Ring([f"r{i}" for i in range(20)])
    homes = Counter(next(ring.walk(f"session-{i}")) for i in range(20_000))
    assert len(homes) == 20
    assert max(homes.values()) < 1.4 * 1000


def test_a_ring_is_the_same_in_every_process() -> None:
    digest = hashlib.sha256()
    ring = Ring(["a", "b", "c"])
    for i in range(64):
        digest.update(next(ring.walk(str(i))).encode())
    assert digest.hexdigest()[:16] == "fc563fab98d900f3"


def test_a_session_stays_at_its_home_and_others_are_drawn() -> None:
    made = routing(8)
    assert len({first(made, "a session") for _ in range(50)}) == 1
    assert len({first(made, f"session {i}") for i in range(50)}) > 4
    assert len({first(made) for _ in range(50)}) > 4
    off = routing(8, sessions=False)
    assert len({first(off, "a session") for _ in range(50)}) > 4


def test_two_routers_agree_on_homes() -> None:
    one, other = routing(8), Routing(RoutingConfig(), Random(99))
    other.set_replicas([f"r{i}" for i in reversed(range(8))])
    for i in range(50):
        assert first(one, f"session {i}") == first(other, f"session {i}")


def test_a_full_home_is_followed_by_the_same_replicas_then_by_any() -> None:
    made = routing(8, fallbacks=2)
    ranks = made.rank("a session", unknown)
    assert [len(rank) for rank in ranks] == [1, 1, 1, 2]
    again = made.rank("a session", unknown)
    assert again[:3] == ranks[:3]
    assert len({name for rank in ranks[:3] for name in rank}) == 3


def test_a_home_without_memory_is_passed_over_while_others_have_some() -> None:
    made = routing(4)
    home, second = (rank[0] for rank in made.rank("a session", unknown)[:2])
    for name in {f"r{i}" for i in range(4)}:
        made.report(name, load(0.5, running=4))
    made.report(home, load(0.99, running=4, waiting=4))
    assert first(made, "a session") == second
    made.report(home, load(0.9, running=4))
    assert first(made, "a session") == home, "it has memory left"


def test_a_session_stays_when_nobody_has_memory() -> None:
    made = routing(4)
    home = first(made, "a session")
    for i in range(4):
        made.report(f"r{i}", load(0.99, running=4, waiting=4))
    assert first(made, "a session") == home


# ---- two choices ----


def test_the_replica_with_more_free_memory_is_taken() -> None:
    made = routing(2)
    made.report("r0", load(0.9, running=2))
    made.report("r1", load(0.2, running=20))
    assert made.rank("", unknown) == [["r1"], ["r0"]], "few long requests hold more than many short"
    by_requests = routing(2, load="requests")
    by_requests.report("r0", load(0.9, running=2))
    by_requests.report("r1", load(0.2, running=20))
    (rank,) = by_requests.rank("", unknown)
    assert sorted(rank) == ["r0", "r1"], "Ray Serve takes the one with fewer requests"


def test_what_was_sent_since_a_report_counts() -> None:
    made = routing(2)
    made.report("r0", load(0.4, running=4))
    made.report("r1", load(0.3, running=4))
    assert first(made, ongoing={"r0": 4, "r1": 4}) == "r1"
    assert first(made, ongoing={"r0": 4, "r1": 8}) == "r0"
    assert first(made, ongoing={"r0": 0, "r1": 4}) == "r1", "another proxy's may be there"


def test_an_idle_replica_does_not_draw_everybody() -> None:
    made = routing(2)
    made.report("r0", load(0.5, running=10))
    made.report("r1", load(0.0, running=0))
    sent = Counter({"r0": 10, "r1": 0})
    for _ in range(10):
        sent[first(made, ongoing=sent)] += 1
    assert sent == {"r0": 10, "r1": 10}
    for _ in range(20):
        sent[first(made, ongoing=sent)] += 1
    assert abs(sent["r0"] - sent["r1"]) <= 2


def test_without_reports_two_are_left_to_ray_serve() -> None:
    made = routing(3)
    made.report("r0", load(0.1, running=1))
    made.report("stranger", load(0.1, running=1))
    for _ in range(20):
        (rank,) = made.rank("", unknown)
        assert len(set(rank)) == 2


def test_nobody_and_one() -> None:
    assert routing(0).rank("a session", unknown) == []
    assert routing(0).rank("", unknown) == []
    assert routing(1).rank("", unknown) == [["r0"]]
    assert routing(1).rank("a session", unknown) == [["r0"], ["r0"]]


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 9)), max_size=30))
def test_after_many_changes_it_decides_as_a_new_one_would(changes: list[tuple[str, int]]) -> None:
    config = RoutingConfig(spill_demand=0.0, spill_imbalance=1.0, fallbacks=9)
    old, new = Routing(config, Random(1)), Routing(config, Random(1))
    old.set_replicas("abcde")
    new.set_replicas("abc")
    latest: dict[str, Load] = {}
    for name, running in changes:
        latest[name] = load(running / 8, running, slots=8)  # sums of eighths are exact
        old.report(name, latest[name])
    old.set_replicas("abc")
    for name, one in latest.items():
        new.report(name, one)
    assert old.rank("a session", unknown) == new.rank("a session", unknown)


@pytest.mark.parametrize("replicas", [10, 1000])
def test_two_choices_keep_the_fullest_near_the_mean(replicas: int) -> None:
    made = routing(replicas)
    for i in range(replicas):
        made.report(f"r{i}", load(0.5, running=5))
    sent: Counter[str] = Counter()
    for _ in range(20 * replicas):
        sent[first(made, ongoing=sent)] += 1
    assert max(sent.values()) <= 24, "at random it would be above 30"
