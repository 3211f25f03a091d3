"""Policies: what they choose is always possible, and is what their names say."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshare.config import PolicyParams, load_config, registry
from memshare.core.token_map import TokenMap
from memshare.mechanisms.baselines.oldest import OldestPolicy
from memshare.mechanisms.baselines.params import OldestParams, RandomParams
from memshare.mechanisms.baselines.random import RandomPolicy
from memshare.mechanisms.remap.mechanism import OnDemandRemap, demand_policy
from memshare.mechanisms.remap.policy import DemandPolicy, Victim
from memshare.mechanisms.step_pairs.params import PaperParams
from memshare.mechanisms.step_pairs.policy import BlockRef, PairProposer
from memshare.mechanisms.twins.params import TwinsParams
from memshare.mechanisms.twins.policy import TwinsPolicy
from memshare.search.evaluate import Span

BLOCK = 16
BLOCKS = TokenMap(BLOCK)


@dataclass
class View:
    """A request's blocks as the engine shows them; ``taken`` were re-pointed already."""

    first: int
    end: int
    full: int
    budget: int
    taken: set[int] = field(default_factory=set)
    shared: frozenset[int] = frozenset()  # not the request's alone: freeing them frees nothing
    covered: tuple[float, ...] = ()  # by block; 0 beyond
    block_threshold: float | None = None
    donated: dict[int, int] = field(default_factory=dict)  # victims of each donor so far

    @property
    def coverage(self) -> npt.NDArray[np.float32]:
        return np.array((*self.covered, *[0.0] * self.full)[: self.full], np.float32)

    def is_own(self, index: int) -> bool:
        return index not in self.taken

    def sharers(self, index: int) -> int:
        return (index in self.shared) + self.donated.get(index, 0)

    def is_target(self, index: int) -> bool:
        assert self.first <= index < self.end, "asked about a protected block"
        return index not in self.taken and index not in self.shared


@st.composite
def views(draw: st.DrawFn) -> View:
    full = draw(st.integers(0, 40))
    first = draw(st.integers(0, 45))
    end = draw(st.integers(0, full))
    indices = st.sets(st.integers(0, 40))
    budget = draw(st.integers(0, full))
    covered = tuple(draw(st.lists(st.floats(0, 1, width=32), max_size=40)))
    return View(first, end, full, budget, draw(indices), frozenset(draw(indices)), covered)


DEMAND = st.one_of(
    st.builds(lambda: demand_policy(OldestParams(name="oldest"))),
    st.builds(lambda s: demand_policy(RandomParams(name="random", seed=s)), st.integers(0, 99)),
    st.builds(
        lambda age: demand_policy(TwinsParams(name="twins", age_weight=age, min_coverage=0.0)),
        st.floats(0, 8),
    ),
)


@given(DEMAND, views())
def test_no_victim_is_better_than_the_promise(demand: DemandPolicy, view: View) -> None:
    victim = demand.choose(view)
    assert victim is None or victim.quality <= demand.promise(view)


@given(DEMAND, views())
def test_every_choice_is_possible(demand: DemandPolicy, view: View) -> None:
    targets = {i for i in range(view.first, view.end) if view.is_target(i)}
    while (victim := demand.choose(view)) is not None:
        assert victim.target in targets, "protected, shared, or taken before"
        assert view.first <= victim.donor < view.full
        assert victim.donor != victim.target
        targets.remove(victim.target)
        view.taken.add(victim.target)
    # It gives up only when no block is left, or none that could stand in.
    if isinstance(demand, TwinsPolicy | RandomPolicy):  # donors are own, wherever they stand
        assert not targets or sum(map(view.is_own, range(view.first, view.full))) < 2
    else:
        assert not targets or view.full - view.first < 2 or targets == {view.full - 1}


def choices(demand: DemandPolicy, view: View, count: int) -> list[Victim]:
    victims: list[Victim] = []
    while len(victims) < count and (victim := demand.choose(view)) is not None:
        victims.append(victim)
        view.taken.add(victim.target)
        view.donated[victim.donor] = view.donated.get(victim.donor, 0) + 1
    return victims


def twins(**params: float) -> TwinsPolicy:
    return TwinsPolicy(TwinsParams.model_validate({"name": "twins", **params}))


def test_twins_takes_the_best_covered_first() -> None:
    view = View(1, 6, 8, 3, covered=(1.0, 0.1, 0.5, 0.9, 0.2, 0.3, 1.0, 1.0))
    policy = twins(age_weight=0.0, min_coverage=0.0)
    targets = [victim.target for victim in choices(policy, view, 10)]
    assert targets == [3, 2, 5, 4, 1]


def test_twins_prefers_old_blocks_by_its_weight() -> None:
    def first(age_weight: float) -> int:
        view = View(0, 6, 8, 3, covered=(0.4, 0.5, 0.5, 0.5, 0.5, 0.6))
        return choices(twins(age_weight=age_weight, min_coverage=0.0), view, 1)[0].target

    assert [first(w) for w in (0.0, 0.25, 1.0)] == [5, 1, 0]


def test_twins_leaves_blocks_alone_that_are_covered_too_little() -> None:
    covered = (0.0, 0.4, 0.6, 0.8, 0.0, 0.0)
    policy = twins(min_coverage=0.5)
    assert {v.target for v in choices(policy, View(0, 5, 6, 3, covered=covered), 9)} == {2, 3}
    # What the request asks for goes first, in both directions.
    for asked, expected in ((0.7, {3}), (0.3, {1, 2, 3})):
        view = View(0, 5, 6, 3, covered=covered, block_threshold=asked)
        assert {v.target for v in choices(policy, view, 9)} == expected


def test_twins_spreads_victims_over_the_nearest_blocks_that_stay() -> None:
    covered = (0.9,) * 10  # all go, in order of age
    victims = choices(twins(), View(0, 10, 40, 10, covered=covered), 10)
    assert [v.target for v in victims] == list(range(10))
    # Likely victims are no donors; one sharer more is better than a donor much further away.
    assert [v.donor for v in victims] == [*range(10, 18), 18, 19]
    near = choices(twins(), View(0, 10, 14, 10, covered=covered), 10)
    assert sorted({v.donor for v in near}) == [10, 11, 12, 13]
    # Before or behind, and behind if both are as near; never the prompt.
    covered = (0.0, 0.0, 0.0, 0.9, 0.9, 0.0, 0.0)
    victims = choices(twins(min_coverage=0.5), View(2, 6, 7, 2, covered=covered), 2)
    assert victims == [Victim(3, 2, pytest.approx(0.9)), Victim(4, 5, pytest.approx(0.9))]
    assert choices(twins(), View(1, 2, 2, 1, covered=(0.0, 0.9)), 1) == [], "nobody else"


@given(views())
def test_a_donor_of_twins_is_another_block_that_is_there_and_no_prompt(view: View) -> None:
    taken = set(view.taken)
    for victim in choices(twins(min_coverage=0.0), view, 100):
        assert view.first <= victim.donor < view.full
        taken.add(victim.target)
        assert victim.donor not in taken


@given(views())
def test_oldest_takes_ascending(view: View) -> None:
    expected = [i for i in range(view.first, view.end) if view.is_target(i)]
    victims = choices(OldestPolicy(), view, 100)
    assert [v.target for v in victims] == expected[: len(victims)]
    assert all(v.donor > v.target for v in victims), "what stays is newer"


@given(st.integers(0, 10), st.integers(1, 20), st.integers(0, 20))
def test_oldest_gives_every_donor_one_victim_where_there_is_room(
    first: int, budget: int, more: int
) -> None:
    full = first + 2 * budget + more
    view = View(first, full, full, budget)
    victims = choices(OldestPolicy(), view, budget)
    donors = {v.donor for v in victims}
    assert len(victims) == len(donors) == budget
    assert donors.isdisjoint(v.target for v in victims)


def test_random_repeats_with_its_seed_and_differs_without() -> None:
    def draw(seed: int) -> list[Victim]:
        demand = RandomPolicy(seed)
        return choices(demand, View(2, 50, 60, 30), 20)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    targets = [v.target for v in draw(1)]
    assert targets != sorted(targets), "random must not be oldest by another name"


def test_random_draws_every_block() -> None:
    demand = RandomPolicy()
    seen = {demand.choose(View(2, 6, 8, 4)) for _ in range(2000)}
    assert {(v.target, v.donor) for v in seen if v} == {
        (t, d) for t in range(2, 6) for d in range(2, 8) if t != d
    }


@st.composite
def span_pairs(draw: st.DrawFn) -> tuple[Span, Span]:
    """A step and an earlier one of the same or of another request."""
    start = draw(st.integers(0, 200))
    earlier = Span("a", 0, start, start + draw(st.integers(1, 100)))
    if draw(st.booleans()):
        start = earlier.end + draw(st.integers(0, 100))
        return Span("a", 0, start, start + draw(st.integers(1, 100))), earlier
    start = draw(st.integers(0, 200))
    return Span("b", 0, start, start + draw(st.integers(1, 100))), earlier


def blocks_of(span: Span) -> list[int]:
    """Blocks that hold a token of ``span``, by looking at each token."""
    return sorted({token // BLOCK for token in range(span.start, span.end)})


@given(span_pairs())
def test_paper_pairs_kth_with_kth(pair: tuple[Span, Span]) -> None:
    later, earlier = pair
    expected = [
        (BlockRef(later, i), BlockRef(earlier, j))
        for i, j in zip(blocks_of(later), blocks_of(earlier), strict=False)
        if (later.request_id, i) != (earlier.request_id, j)
    ]
    oldest = PairProposer(PaperParams(name="paper", survivor="oldest"))
    newest = PairProposer(PaperParams(name="paper", survivor="newest"))
    assert [(p.target, p.donor) for p in oldest.propose(later, earlier, BLOCKS)] == expected
    assert [(p.donor, p.target) for p in newest.propose(later, earlier, BLOCKS)] == expected


@pytest.mark.parametrize("survivor", ["oldest", "newest"])
def test_paper_never_pairs_a_block_with_itself(survivor: str) -> None:
    staged = PairProposer(PaperParams.model_validate({"name": "paper", "survivor": survivor}))
    earlier, later = Span("a", 0, 2 * BLOCK, 2 * BLOCK + 4), Span("a", 0, 2 * BLOCK + 4, 3 * BLOCK)
    assert list(staged.propose(later, earlier, BLOCKS)) == []
    # Negative control: the same positions of two requests are different blocks.
    other = earlier._replace(request_id="b")
    assert len(list(staged.propose(later, other, BLOCKS))) == 1


def test_less_similar_means_more_damage() -> None:
    staged = PairProposer(PaperParams(name="paper"))
    assert staged.damage(1.0) == 0.0 < staged.damage(0.8) < staged.damage(0.2)


def test_every_name_stands_for_a_mechanism_with_its_own_parameters() -> None:
    kinds: set[type[PolicyParams]] = set()
    for name in registry.BUILT_IN:
        config = load_config({"policy": {"name": name}}, {})
        mechanism = registry.mechanism_of(config.policy)
        assert type(config.policy) is mechanism.params
        assert config.policy.name == name
        assert config.uses_stages is mechanism.searches
        kinds.add(type(config.policy))
    assert len(kinds) == len(registry.BUILT_IN)


def test_those_that_choose_on_demand_have_a_policy_of_their_own() -> None:
    policies = set()
    for name in registry.BUILT_IN:
        params = load_config({"policy": {"name": name}}, {}).policy
        if issubclass(registry.mechanism_type(name), OnDemandRemap):
            policies.add(type(demand_policy(params)))
        else:
            with pytest.raises(ValueError, match=f"policy '{name}' chooses no victims on demand"):
                demand_policy(params)
    assert policies == {OldestPolicy, RandomPolicy, TwinsPolicy}
