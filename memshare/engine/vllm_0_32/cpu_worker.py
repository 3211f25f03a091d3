"""vLLM's worker on CPUs, mended where a request's ``seed`` would end the engine.

A step that computes only a part of a prompt samples a token all the same, and discards it. The
model runner then winds the request's random generator back (``gen.set_offset`` in
``_bookkeeping_sync``, vllm/v1/worker/gpu_model_runner.py), which generators on CPUs cannot do: the
call raises, and the engine is dead for everybody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from vllm.v1.worker.cpu_worker import CPUWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput
    from vllm.v1.outputs import ModelRunnerOutput


class SeedSafeCPUWorker(CPUWorker):
    """``CPUWorker`` that draws discarded tokens without the generators of their requests, so that
    nothing has to be wound back."""

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        """Sample; rows of the batch whose token will be discarded use no generator of their own."""
        runner = self.model_runner
        generators = runner.input_batch.generators
        discarded = runner.discard_request_mask.np
        aside = {row: generators.pop(row) for row in list(generators) if discarded[row]}
        try:
            return cast("ModelRunnerOutput", super().sample_tokens(grammar_output))
        finally:
            generators.update(aside)
