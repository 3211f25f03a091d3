"""Bounds of pages, and which pages are read, against plain loops."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from memshare.config import SelectionConfig
from memshare.mechanisms.selection.bounds import PageBounds, PageWrites, split_signs
from memshare.mechanisms.selection.budget import chooses, pages_read
from memshare.mechanisms.selection.choice import PageChooser

PAGES, HEADS, SIZE, CHANNELS = 12, 2, 4, 6


class Cache:
    """Keys of a paged cache, and bounds that are kept beside it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.keys = torch.zeros(PAGES, HEADS, SIZE, CHANNELS, dtype=dtype)
        self.bounds = PageBounds(PAGES, HEADS, CHANNELS, dtype, torch.device("cpu"))
        self.filled = np.zeros(PAGES, int)

    def write(self, slots: np.ndarray, keys: torch.Tensor) -> None:
        for slot, key in zip(slots.tolist(), keys, strict=True):
            if slot >= 0:
                self.keys[slot // SIZE, :, slot % SIZE] = key
                self.filled[slot // SIZE] = slot % SIZE + 1
        self.bounds.write(keys, PageWrites.of(slots, SIZE))

    def check(self) -> None:
        for page, filled in enumerate(self.filled):
            if filled:
                held = self.keys[page, :, :filled]
                wanted = torch.cat((held.amax(1), -held.amin(1)), -1)
                assert torch.equal(self.bounds.highs[page], wanted), page


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bounds_are_those_of_what_the_page_holds(data: st.DataObject) -> None:
    """Prompts in chunks, tokens one by one, blocks that are used again, padding in between."""
    cache = Cache(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    requests: list[tuple[list[int], int]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()) or not requests:
            held = {page for pages, _ in requests for page in pages}
            free = [page for page in range(PAGES) if page not in held]
            if len(free) >= 3:
                requests.append((data.draw(st.permutations(free))[:3], 0))
        elif data.draw(st.booleans()):
            requests.pop(data.draw(st.integers(0, len(requests) - 1)))  # finished: used again
        slots, grown = [], []
        for pages, length in requests:
            more = min(data.draw(st.sampled_from([0, 1, 3, 4, 9])), 3 * SIZE - length)
            positions = range(length, length + more)
            slots += [pages[at // SIZE] * SIZE + at % SIZE for at in positions]
            slots += [-1] * data.draw(st.integers(0, 1))
            grown.append((pages, length + more))
        requests = grown
        keys = torch.randn(len(slots), HEADS, CHANNELS, generator=generator)
        cache.write(np.array(slots, np.int64), keys.to(cache.keys.dtype))
        cache.check()


def test_a_page_that_is_used_again_forgets_what_it_held() -> None:
    cache = Cache()
    cache.write(np.arange(SIZE), torch.full((SIZE, HEADS, CHANNELS), 9.0))
    cache.write(np.arange(1), torch.ones(1, HEADS, CHANNELS))
    cache.check()
    cache.filled[0] = SIZE  # control: what is left of the first would have been seen
    with pytest.raises(AssertionError):
        cache.check()


def test_a_page_whose_tokens_were_moved_is_rebuilt() -> None:
    cache = Cache()
    cache.write(np.arange(2 * SIZE), torch.randn(2 * SIZE, HEADS, CHANNELS))
    cache.keys[0, 0, 1], cache.keys[0, 1, 2] = cache.keys[1, 0, 3] + 5, cache.keys[1, 1, 0] - 5
    with pytest.raises(AssertionError):
        cache.check()
    pages = torch.tensor([0, 1])
    cache.bounds.rebuild(pages, cache.keys[pages])
    cache.check()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31))
def test_no_token_scores_above_its_page_s_bound(seed: int) -> None:
    cache = Cache()
    generator = torch.Generator().manual_seed(seed)
    cache.write(
        np.arange(PAGES * SIZE), torch.randn(PAGES * SIZE, HEADS, CHANNELS, generator=generator)
    )
    queries = torch.randn(HEADS, 3, CHANNELS, generator=generator)
    bound = torch.einsum("hgc,phc->hgp", split_signs(queries), cache.bounds.highs)
    scores = torch.einsum("hgc,phsc->hgps", queries, cache.keys)
    assert (scores.amax(-1) <= bound + 1e-5).all()
    cache.keys[0] *= 3
    assert (torch.einsum("hgc,phsc->hgps", queries, cache.keys).amax(-1) > bound).any(), "control"


# ---- how many, and which ----


@pytest.mark.parametrize(
    ("config", "pages", "read"),
    [
        ({"budget": 1.0}, [1, 7, 100], [1, 7, 100]),
        ({"budget": 0.25}, [1, 2, 8, 20, 250], [1, 2, 3, 5, 63]),
        ({"budget": 0.001, "first_pages": 0, "recent_pages": 1}, [1, 2, 8], [1, 1, 1]),
        ({"pages": 4}, [1, 4, 5, 100], [1, 4, 4, 4]),
        ({"pages": 1000}, [1, 999], [1, 999]),
    ],
)
def test_how_many(config: dict[str, Any], pages: list[int], read: list[int]) -> None:
    found = pages_read(SelectionConfig(**config), np.array(pages, np.int32))
    assert found.tolist() == read
    less = [chooses(SelectionConfig(**config), count) for count in pages]
    assert less == [kept < count for kept, count in zip(read, pages, strict=True)]


@st.composite
def steps(draw: st.DrawFn) -> Any:
    rows = draw(st.integers(1, 5))
    lens = np.array(draw(st.lists(st.integers(1, 60), min_size=rows, max_size=rows)), np.int32)
    seed = draw(st.integers(0, 2**31))
    options = {"first_pages": draw(st.integers(0, 2)), "recent_pages": draw(st.integers(1, 3))}
    config = draw(
        st.sampled_from([{"budget": 0.3}, {"budget": 0.7}, {"budget": 1.0}, {"pages": 6}])
    )
    return lens, seed, SelectionConfig(**options, **config)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps(), min_size=1, max_size=3), st.integers(1, 3))
def test_the_best_pages_are_chosen_and_those_that_are_always_read(
    batches: list[Any], group: int
) -> None:
    """One chooser, whose buffers stay, for batches of several shapes."""
    choosers: dict[str, PageChooser] = {}
    for lens, seed, config in batches:
        chooser = choosers.setdefault(repr(config), PageChooser(config, HEADS, SIZE, 80))
        generator = torch.Generator().manual_seed(seed)
        highs = torch.randn(80, HEADS, 2 * CHANNELS, generator=generator)
        bounds = PageBounds(80, HEADS, CHANNELS, torch.float32, torch.device("cpu"))
        bounds.highs.copy_(highs)
        table = torch.stack([torch.randperm(80, generator=generator)[:20] for _ in lens]).int()
        queries = torch.randn(len(lens), HEADS * group, CHANNELS, generator=generator)
        plan = chooser.begin(table, lens)
        chosen = chooser.choose(plan, queries, bounds)
        row = 0
        for request, length in enumerate(lens.tolist()):
            pages = -(-length // SIZE)
            read = int(pages_read(config, np.array([pages], np.int32))[0])
            for head in range(HEADS):
                own = queries[request, head * group : (head + 1) * group]
                score = torch.stack(
                    [
                        (split_signs(own) @ highs[int(page), head]).max()
                        for page in table[request, :pages]
                    ]
                )
                always = set(range(config.first_pages)) | set(
                    range(pages - config.recent_pages, pages)
                )
                always &= set(range(pages))
                best = [at for at in score.argsort(descending=True).tolist() if at not in always]
                wanted = sorted(always | set(best[: read - len(always)]))
                assert len(wanted) == read
                expected = [int(table[request, at]) * HEADS + head for at in wanted]
                assert chosen[row, :read].tolist() == expected
                assert int(plan.lens[row]) == length - (pages - read) * SIZE
                row += 1
        assert row == len(chosen) == len(plan.lens)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_copies_follow_tables_and_bounds(data: st.DataObject) -> None:
    """From step to step batches grow and shrink, rows change places, pages are written to."""
    config, pool = SelectionConfig(budget=0.4), 40
    chooser = PageChooser(config, HEADS, SIZE, pool)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    layers = [PageBounds(pool, HEADS, CHANNELS, torch.float32, torch.device("cpu")) for _ in "ab"]
    rows = [torch.randperm(pool, generator=generator)[:9] for _ in range(4)]
    for _ in range(data.draw(st.integers(1, 6))):
        order = data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 4))]
        for row in data.draw(st.lists(st.sampled_from(range(4)), max_size=2)):
            rows[row] = torch.randperm(pool, generator=generator)[:9]
        lens = np.array([data.draw(st.integers(20, 36)) for _ in order], np.int32)
        table = torch.stack([rows[row] for row in order]).int()
        written = np.array(data.draw(st.lists(st.integers(0, pool - 1), max_size=6)), np.int64)
        chooser.changes(written)
        plan = chooser.begin(table, lens)
        for bounds in layers:
            new = torch.randn(len(written), HEADS, 2 * CHANNELS, generator=generator)
            bounds.highs[torch.from_numpy(written)] = 3 * new
            queries = torch.randn(len(order), 2 * HEADS, CHANNELS, generator=generator)
            found = chooser.choose(plan, queries, bounds).clone()
            assert torch.equal(chooser.choose(plan, queries, bounds), found), "shared by layers"
            anew = PageChooser(config, HEADS, SIZE, pool)
            apart = PageBounds(pool, HEADS, CHANNELS, torch.float32, torch.device("cpu"))
            apart.highs.copy_(bounds.highs)
            wanted = anew.choose(anew.begin(table, lens), queries, apart)
            for row, read in enumerate(np.repeat(plan.read, HEADS).tolist()):
                assert found[row, :read].tolist() == wanted[row, :read].tolist()


def test_a_page_that_changes_unsaid_is_not_seen() -> None:
    """Negative control of the test above."""
    config = SelectionConfig(budget=0.5, first_pages=0, recent_pages=1)
    chooser = PageChooser(config, 1, SIZE, 8)
    bounds = PageBounds(8, 1, CHANNELS, torch.float32, torch.device("cpu"))
    table, lens = torch.arange(6)[None].int(), np.array([6 * SIZE], np.int32)
    queries = torch.ones(1, 1, CHANNELS)
    bounds.highs[1:3] = 5
    first = chooser.choose(chooser.begin(table, lens), queries, bounds).clone()
    assert first.tolist() == [[1, 2, 5]]
    bounds.highs[3:5] = 9
    assert chooser.choose(chooser.begin(table, lens), queries, bounds).tolist() == [[1, 2, 5]]
    chooser.changes(np.arange(3, 5))
    assert chooser.choose(chooser.begin(table, lens), queries, bounds).tolist() == [[3, 4, 5]]
