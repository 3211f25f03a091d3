"""Proposals fit, are the best of all that fit, and follow the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memshare.moe.placement.model_config import shape_of
from memshare.moe.placement.parallelism import Parallelism, refusals
from memshare.moe.placement.proposal import (
    NEARLY_BEST,
    Load,
    Machine,
    least_weight_bytes,
    propose,
    touched,
)
from memshare.moe.placement.ranks import place
from tests.memshare.moe.placement.published import ALL, DEEPSEEK_V3, LLAMA_8B, QWEN3_30B

GIB = 1 << 30
H100 = Machine(8, 80 * GIB, 8, 0.9, 4 * GIB, 3.35e12, 450e9, 50e9)
LOAD = Load(context=8192, max_num_seqs=128, kv_number_bytes=2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("gpus", [1, 2, 8, 16])
def test_every_candidate_fits(name: str, gpus: int) -> None:
    shape, machine = shape_of(ALL[name]), replace(H100, gpus=gpus)
    candidates = propose(shape, machine, LOAD)
    room = machine.gpu_bytes * machine.utilization - machine.reserve_bytes
    for one in candidates:
        assert not any(refusals(shape, one.parallelism))
        assert one.copies * one.parallelism.ranks == gpus
        assert one.parallelism.tensor_parallel_size <= machine.per_node
        ranks = place(shape, one.parallelism).ranks
        assert max(rank.all_weight_bytes for rank in ranks) == one.weight_bytes
        held = one.requests // (one.copies * one.parallelism.data_parallel_size)
        for rank in ranks:
            size = rank.request_bytes(shape, LOAD.context)
            assert rank.all_weight_bytes + held * size <= room
    if candidates:
        assert candidates[0].tokens_s >= NEARLY_BEST * max(one.tokens_s for one in candidates)
    assert bool(candidates) == (name != "deepseek" or gpus == 16) or name == "mixtral"


def test_deepseek_keeps_its_latent_vectors_once() -> None:
    """Data-parallel attention, or divided tokens: plain tensor parallelism copies them."""
    shape = shape_of(DEEPSEEK_V3)
    first, *others = propose(shape, replace(H100, gpus=16), LOAD)
    assert place(shape, first.parallelism).kv_copies == 1
    by_division = {one.parallelism: one for one in others}
    copied = by_division[Parallelism(tensor_parallel_size=8, data_parallel_size=2)]
    assert first.requests > 1.5 * copied.requests
    assert first.tokens_s > 1.3 * copied.tokens_s


def test_of_nearly_equal_ones_whole_experts_are_taken() -> None:
    first, second, *_ = propose(shape_of(QWEN3_30B), H100, LOAD)
    assert first.parallelism.enable_expert_parallel
    assert first.tokens_s == pytest.approx(second.tokens_s, rel=1 - NEARLY_BEST)


def test_a_small_model_runs_in_copies() -> None:
    first, *_ = propose(shape_of(LLAMA_8B), H100, replace(LOAD, context=1024))
    assert (first.copies, first.parallelism) == (8, Parallelism())


def test_a_slow_network_keeps_copies_within_nodes() -> None:
    shape = shape_of(QWEN3_30B)
    machine = replace(H100, gpus=16)
    slow = propose(shape, replace(machine, network_bytes_s=5e9), LOAD)[0]
    assert slow.parallelism.ranks <= 8
    fast = {one.parallelism: one.tokens_s for one in propose(shape, machine, LOAD)}
    wide = Parallelism(data_parallel_size=16, enable_expert_parallel=True)
    slower = {one.parallelism: one.tokens_s for one in propose(
        shape, replace(machine, network_bytes_s=5e9), LOAD
    )}  # fmt: skip
    assert slower[wide] < 0.5 * fast[wide]


def test_what_does_not_fit() -> None:
    shape, machine = shape_of(DEEPSEEK_V3), replace(H100, gpus=4)
    assert propose(shape, machine, LOAD) == []
    assert 150 * GIB < least_weight_bytes(shape, machine) < 160 * GIB
    assert propose(shape_of(LLAMA_8B), H100, replace(LOAD, context=10_000_000)) == []


def test_experts_that_a_step_touches() -> None:
    assert touched(128, 8, 1) == pytest.approx(8 / 128)
    assert touched(8, 8, 1) == 1.0
    assert touched(128, 8, 2) == pytest.approx(1 - (120 / 128) ** 2)
