"""Costs of an engine step: fitted, and from published numbers."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from memshare.lab.simulate.costs import Deployment, Recomputation, StepCosts, StepWork, fit

H100 = {
    "name": "32B on 4", "parameters": 32.5e9, "layers": 64, "kv_heads": 8, "head_dim": 128,
    "accelerators": 4, "memory_gb": 80, "bandwidth_gb_s": 3350, "teraflops": 989,
}  # fmt: skip


def steps(costs: StepCosts, count: int, noise: float) -> list[tuple[StepWork, float]]:
    draw = random.Random(0)
    found = []
    for _ in range(count):
        requests = draw.randint(1, 40)
        work = StepWork(
            requests, requests + draw.choice((0, 0, 0, 500)), requests * draw.randint(50, 900)
        )
        found.append((work, costs.seconds(work) * draw.uniform(1 - noise, 1 + noise)))
    return found


@given(
    step=st.floats(1e-3, 0.1), request=st.floats(1e-4, 1e-2), token=st.floats(1e-4, 1e-2),
    context=st.floats(1e-7, 1e-5),
)  # fmt: skip
def test_costs_are_found_again(step: float, request: float, token: float, context: float) -> None:
    costs = StepCosts(step, request, token, context)
    found = fit(steps(costs, 300, 0.0))
    assert list(found) == pytest.approx(list(costs), rel=1e-3, abs=1e-9)


def test_noise_and_a_stall_change_little() -> None:
    costs = StepCosts(0.02, 0.001, 0.0005, 1e-6)
    measured = steps(costs, 600, 0.2)
    measured[10] = (measured[10][0], 5.0)
    found = fit(measured)
    work = StepWork(20, 20, 8000)
    assert found.seconds(work) == pytest.approx(costs.seconds(work), rel=0.05)


def test_what_is_computed_again_is_counted_and_what_is_found_is_not() -> None:
    requests: dict[str, SimpleNamespace] = {}
    again = Recomputation()

    def step(**tokens: tuple[int, int]) -> int:
        """Each request's tokens of this step, and how many it has then."""
        for name, (_, reached) in tokens.items():
            requests[name] = SimpleNamespace(num_computed_tokens=reached)
        counts = {name: count for name, (count, _) in tokens.items()}
        again.add_step(
            cast("Any", SimpleNamespace(requests=requests)),
            cast("Any", SimpleNamespace(num_scheduled_tokens=counts)),
        )
        return again.tokens

    assert step(a=(40, 40), b=(8, 40)) == 0, "32 of b were found in the prefix cache"
    assert step(a=(1, 41), b=(1, 41)) == 0
    assert step(a=(1, 42)) == 0, "b is preempted"
    assert step(a=(1, 43), b=(9, 41)) == 9, "32 are found again, 9 are not"
    assert step(b=(1, 42)) == 9
    assert step(a=(20, 20)) == 29, "a chunk of what was there"
    assert step(a=(30, 50)) == 52, "up to 43 again, seven new"


def test_no_cost_is_negative() -> None:
    # The more context, the faster: nonsense, as a short noisy run may say.
    odd = [(StepWork(1, 1, 10 * i), 1.0 - 0.001 * i) for i in range(200)]
    assert min(fit(odd)) >= 0.0


def test_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit(steps(StepCosts(1, 1, 1, 1), 99, 0.0))


def test_a_deployment_has_the_memory_and_the_speed_of_its_numbers() -> None:
    deployment = Deployment.model_validate(H100)
    assert deployment.kv_bytes_per_token == 2 * 64 * 8 * 128 * 2
    left = 4 * (80e9 * 0.9 - 4e9) - 65e9
    assert deployment.blocks == int(left // (262144 * 16))
    read = 4 * 3350e9 * 0.6
    assert deployment.costs.step == pytest.approx(0.002 + 65e9 / read)
    assert deployment.costs.context == pytest.approx(262144 / read)
    assert deployment.costs.token == pytest.approx(65e9 / (4 * 989e12 * 0.6))


def test_weights_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="raise accelerators"):
        _ = Deployment.model_validate(H100 | {"accelerators": 1, "memory_gb": 40}).blocks


@pytest.mark.parametrize("wrong", [{"gpus": 4}, {"layers": 0}, {"efficiency": 1.5}])
def test_a_wrong_deployment_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Deployment.model_validate(H100 | wrong)
