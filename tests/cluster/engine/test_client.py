"""What the engine client asks of a request and keeps of it (cluster/engine/client.py); outputs are
made up here, by no engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from cluster.engine.client import GatedAsyncLLM
from cluster.tenancy.gate import Gate
from cluster.tenancy.keys import KeylessConfig
from cluster.tenancy.limits import Ledger, Limiter, LocalLedgerClient

pytestmark = pytest.mark.engine  # vLLM is loaded; no engine starts

LOOP = StructuredOutputsParams(json={"$ref": "#"})


class Counts:
    def count(self, name: str, *values: str, by: int = 1) -> None:
        pass


class Used:
    """A request in the engine."""

    def tokens(self) -> tuple[int, int]:
        return 7, 1


class Engine(GatedAsyncLLM):
    """Without an engine: each request ends with its first output, for a reason given here."""

    def __init__(self, gate: Gate, reason: str) -> None:
        self.gate = gate
        self.public_name = "m"
        self.uses_memshare = True
        self.unavailable_s = 17
        self.reason = reason
        self.closed = 0

    def __del__(self) -> None:
        pass  # nothing was started

    async def _outputs(  # type: ignore[override]
        self, prompt: Any, params: SamplingParams, request_id: str, options: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        self.gate.call().began(request_id, Used())
        try:
            completion = CompletionOutput(0, "a", [1], 0.0, None, finish_reason=self.reason)
            yield RequestOutput(request_id, None, [2], None, [completion], True)
        finally:
            self.closed += 1


def gate(**bounds: int) -> Gate:
    return Gate(None, Limiter(LocalLedgerClient(Ledger()), "r"), Counts(), KeylessConfig(**bounds))


async def outputs(engine: Engine, params: SamplingParams, name: str = "r") -> list[RequestOutput]:
    async with aclosing(engine.generate("x", params, name)) as generated:
        return [output async for output in generated]


@pytest.mark.parametrize("reason", ["stop", "length", "error"])
async def test_what_no_text_fits_is_the_requests_fault(reason: str) -> None:
    engine = Engine(gate(), reason)
    assert len(await outputs(engine, SamplingParams())) == 1, "vLLM's front end judges"
    constrained = SamplingParams(structured_outputs=LOOP)
    if reason == "error":
        with pytest.raises(VLLMValidationError, match="no text fits what structured_outputs") as no:
            await outputs(engine, constrained)
        assert no.value.parameter == "structured_outputs"
    else:
        assert len(await outputs(engine, constrained)) == 1
    assert engine.closed == 2


async def test_without_keys_a_request_has_so_many_sequences() -> None:
    engine = Engine(gate(), "stop")
    with pytest.raises(VLLMValidationError, match=r"4000 sequences .* more than the 128"):
        engine.generate("x", SamplingParams(n=4000), "r")
    assert len(await outputs(engine, SamplingParams(n=128))) == 1
    with pytest.raises(VLLMValidationError, match=r"3 sequences .* more than the 2"):
        Engine(gate(sequences_per_request=2), "stop").generate("x", SamplingParams(n=3), "r")


async def test_of_beams_that_have_ended_only_the_sum_is_kept() -> None:
    doors = gate()
    engine = Engine(doors, "length")
    async with doors.admit(doors.identify(None, "127.0.0.1")) as call:
        for token in range(50):
            for beam in range(4):
                await outputs(engine, SamplingParams(max_tokens=1), f"{token}-beam-{beam}")
        assert call._running == {}
        assert call.tokens() == (7 * 200, 200)
        assert call.sequences == 0
