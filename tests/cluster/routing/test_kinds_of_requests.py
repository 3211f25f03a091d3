"""Requests whose kind is named meet on the same replicas, and load still decides."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import RoutingConfig
from cluster.routing.choice import Routing
from cluster.routing.kinds import Kinds
from cluster.routing.load import Load
from cluster.routing.ring import Ring

REPLICAS = [f"r{i}" for i in range(8)]


def routing(**config: object) -> Routing:
    made = Routing(RoutingConfig.model_validate({"kinds": True, **config}), Random(1))
    made.set_replicas(REPLICAS)
    for name in REPLICAS:
        made.report(name, Load(0.5, 8, 0, 64, 0))
    return made


def chosen(made: Routing, kind: str, session: str = "", times: int = 200) -> Counter[str]:
    """Where requests of a kind go, while as many of another come."""
    found: Counter[str] = Counter()
    for _ in range(times):
        for each in ("a", "b"):
            (first, *_), *_ = made.rank(session, lambda _: None, each)
            found[first] += each == kind
    return +found


@given(
    st.sets(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=12),
    st.lists(st.sampled_from("pqrst"), min_size=1, max_size=400),
)
def test_every_replica_is_preferred_by_some_kind(names: set[str], asked: list[str]) -> None:
    kinds = Kinds(Ring(names))
    kinds.set_replicas(names)
    for kind in asked:
        stretch = kinds.stretch(kind)
        assert stretch is not None
        assert set(stretch.names) <= names
    kinds.set_replicas(names)  # with the shares of now
    found = {kind: kinds.stretch(kind) for kind in set(asked)}
    served = set().union(*(one.names for one in found.values() if one))
    # All but slivers: a tenth of a replica at either end.
    assert len(served) >= len(names) - len(found)


def test_a_kind_has_as_many_replicas_as_its_share_of_the_requests() -> None:
    kinds = Kinds(Ring(REPLICAS))
    kinds.set_replicas(REPLICAS)
    for i in range(4000):
        kinds.stretch("many" if i % 4 else "few")
    few, many = kinds.stretch("few"), kinds.stretch("many")
    assert few is not None
    assert many is not None
    assert (len(few.names), len(many.names)) == (2, 6)
    assert set(few.names).isdisjoint(many.names)
    for _ in range(8000):  # the other one comes no more
        many = kinds.stretch("many")
    assert many is not None
    assert len(many.names) == 8


def test_names_that_callers_invent_are_bounded() -> None:
    kinds = Kinds(Ring(REPLICAS))
    kinds.set_replicas(REPLICAS)
    found = [kinds.stretch(f"kind{i}") for i in range(1000)]
    assert sum(one is not None for one in found) == 64


@pytest.mark.parametrize("sessions", [False, True])
def test_kinds_meet_on_replicas_of_their_own(sessions: bool) -> None:
    made = routing(sessions=sessions)
    chosen(made, "a")
    of_a, of_b = chosen(made, "a"), chosen(made, "b")
    assert set(chosen(routing(kinds=False), "a")) == set(REPLICAS), "negative control"
    assert set(of_a).isdisjoint(of_b)
    assert len(of_a) == len(of_b) == 4


def test_a_session_keeps_one_home_within_its_kind() -> None:
    made = routing()
    chosen(made, "a")
    preferred = set(chosen(made, "a"))
    homes = [chosen(made, "a", f"session{i}", times=20) for i in range(50)]
    assert all(len(home) == 1 for home in homes)
    assert {name for home in homes for name in home} <= preferred


def test_a_shared_kind_does_not_send_all_to_full_replicas() -> None:
    """One kind of two has replicas that are fuller than others: its requests go elsewhere, too."""
    made = routing()
    chosen(made, "a")
    of_a = set(chosen(made, "a"))
    for name in REPLICAS:
        made.report(name, Load(0.9 if name in of_a else 0.1, 8, 0, 64, 0))
    assert len(chosen(made, "a")) > len(of_a)
    made = routing(spill_imbalance=9)
    chosen(made, "a")
    of_a = set(chosen(made, "a"))
    for name in REPLICAS:
        made.report(name, Load(0.9 if name in of_a else 0.1, 8, 0, 64, 0))
    assert set(chosen(made, "a")) == of_a, "negative control"


@pytest.mark.parametrize("kind", ["", "a"])
def test_there_is_always_a_second_choice(kind: str) -> None:
    made = routing()
    ranks = made.rank("", lambda _: None, kind)
    assert len({name for rank in ranks for name in rank}) >= 2
    made.set_replicas([])
    assert made.rank("", lambda _: None, kind) == []
