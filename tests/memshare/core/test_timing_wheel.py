"""The timing wheel against a list of (due tick, item)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memshare.core.timing_wheel import TimingWheel

# What happens: schedule the next item so many ticks ahead, or let one tick pass.
ACTIONS = st.lists(st.one_of(st.none(), st.integers(1, 12)), max_size=80)


@given(ACTIONS)
def test_every_item_comes_up_once_on_its_tick_in_order(actions: list[int | None]) -> None:
    wheel: TimingWheel[int] = TimingWheel()
    model: list[tuple[int, int]] = []
    now = 0
    for item, ticks in enumerate(actions):
        if ticks is not None:
            wheel.schedule(item, ticks)
            model.append((now + ticks, item))
        else:
            now += 1
            due = [i for at, i in model if at == now]
            assert wheel.due_within(1) == len(due)
            assert wheel.due_within(3) == sum(now <= at < now + 3 for at, _ in model)
            assert wheel.advance() == due
    later = [i for at, i in sorted(model) if at > now]
    assert [i for _ in range(12) for i in wheel.advance()] == later


def test_an_item_may_be_scheduled_while_it_comes_up() -> None:
    wheel: TimingWheel[str] = TimingWheel()
    wheel.schedule("a", 1)
    for _ in range(3):
        assert wheel.advance() == ["a"]
        wheel.schedule("a", 1)


def test_an_empty_wheel_keeps_nothing() -> None:
    wheel: TimingWheel[int] = TimingWheel()
    for tick in range(1000):
        wheel.schedule(tick, 3)
        wheel.advance()
    assert len(wheel._due) <= 3, "slots that came up must not stay"
