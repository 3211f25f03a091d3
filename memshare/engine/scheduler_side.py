"""The connector's scheduler half: one call an engine step, from new tokens to remaps.

A step runs through :meth:`SchedulerSide.build_message` in this order: forget what was preempted,
take candidates that evaluators have found, look at requests that have filled a block, reclaim, and
hand stage-two work to the workers. Results come back through :meth:`SchedulerSide.receive`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from memshare.config import MemShareConfig
from memshare.core.admission import Admission
from memshare.core.reclaimer import Reclaimer
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState
from memshare.core.timing_wheel import TimingWheel
from memshare.core.token_map import TokenMap
from memshare.engine.messages import SchedulerMessage, WorkerMessage
from memshare.engine.usage import ReturnedUsage, returned_usage
from memshare.engine.vllm_0_32.block_tables import BlockTables
from memshare.mechanisms.registry import load_policy
from memshare.mechanisms.remap.policy import DemandPolicy, StagedPolicy
from memshare.mechanisms.remap.verifier import PairVerifier
from memshare.mechanisms.step_pairs.verifier import BlockPairVerifier
from memshare.mechanisms.twins.verifier import TokenPairVerifier
from memshare.search.bridge import EvaluatorBridge
from memshare.search.step_feeder import StepFeeder
from memshare.search.steps import DelimiterAutomaton
from memshare.telemetry.block_census import BlockCensus
from memshare.telemetry.recorder import Recorder
from memshare.telemetry.stats import Payload

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

# Engine steps whose demand for blocks is met in advance. Two, because a request's first remap must
# not fall into the step that completes a block (Reclaimer._must_wait), which is the last before it
# wants the next one.
_AHEAD = 2


class IntegrityError(RuntimeError):
    """Our bookkeeping and vLLM's differ. The text lists the differences."""


class SchedulerSide:
    """The scheduler half. Every method is called on the engine's thread."""

    def __init__(
        self,
        config: MemShareConfig,
        manager: KVCacheManager,
        block_size: int,
        world_size: int,
        automaton: DelimiterAutomaton | None,
        open_bridge: Callable[[], EvaluatorBridge],
    ) -> None:
        """Take hold of vLLM's block tables; start evaluators and event log.

        Args:
            config: a valid configuration whose mode is not ``off``.
            manager: vLLM's KV cache manager.
            block_size: token slots in a block.
            world_size: ranks whose partial results make a whole one.
            automaton: compiled step delimiters; None only if the policy needs no steps.
            open_bridge: makes the bridge to the evaluators; called only if the policy needs them.
        """
        policy = load_policy(config.policy)
        self.config = config
        self.recorder = Recorder(config)
        self.tables = BlockTables(manager, TokenMap(block_size))
        self.tracker = RequestTracker(config, automaton, self.tables)
        survey: TokenPairVerifier | None = None
        if isinstance(policy, DemandPolicy) and policy.uses_coverage:
            survey = TokenPairVerifier(
                config.distance, self.tracker, self.tables, self.recorder, world_size
            )
        self.reclaimer = Reclaimer(config, policy, self.tracker, self.tables, survey, self.recorder)
        self.admission = Admission(config.admission, self.tracker, self.reclaimer, self.tables)
        self.jobs: PairVerifier | None = survey
        if isinstance(policy, StagedPolicy):
            self.jobs = BlockPairVerifier(
                config.distance, policy, self.tracker, self.tables, self.reclaimer, self.recorder,
                world_size,
            )  # fmt: skip
        self.intake: StepFeeder | None = None
        if self.jobs is not None:
            self.intake = StepFeeder(config, open_bridge(), self.recorder)
        self._census = BlockCensus(config.report, self.tracker, self.tables, self.recorder.counters)
        self._wheel: TimingWheel[tuple[RequestState, int]] = TimingWheel()  # state, generation
        self._check_wanted = False
        self._check_failed = False
        self.recorder.event(
            "started", blocks=self.tables.total, mode=config.mode, policy=config.policy.name
        )

    def close(self) -> None:
        """Stop threads and close files. Idempotent."""
        if self.intake is not None:
            self.intake.close()
        self.recorder.close()

    # ---- requests come and go ----

    def add(self, request: Request) -> None:
        """Begin to follow a request, unless it must stay exact."""
        reason = self.tracker.add(request)
        if reason is not None:
            self.recorder.counters.add_labelled("opted_out", reason)
            self.recorder.event("opted_out", request=request.request_id, reason=reason)

    def finish(self, request: Request) -> ReturnedUsage | None:
        """Stop following a request; vLLM frees its blocks right after this call.

        Returns:
            What goes back with its last output; None if it has not asked for anything.
        """
        request_id = request.request_id
        state = self.tracker.remove(request_id)
        usage = returned_usage(request, state, self.tables.entries(request_id))
        if state is None:
            return usage
        self.recorder.event("finished", request=request_id, shared=len(state.repointed))
        self.reclaimer.forget(state, "finished")
        self.admission.forget(state)
        self._forget_stages(state)
        return usage

    def admitted(self, request_id: str) -> None:
        """vLLM has given blocks to a request that was waiting."""
        state = self.tracker.get(request_id)
        if state is not None:
            self.admission.admitted(state)

    # ---- one engine step ----

    def build_message(self, output: SchedulerOutput) -> SchedulerMessage:
        """Run one step of MemShare; called when vLLM has scheduled, before it executes."""
        self.recorder.step += 1
        self._note_schedule(output)
        if self.intake is not None and self.jobs is not None:
            for answer in self.intake.answers():
                self.jobs.propose(answer)
        for state, generation in self._wheel.advance():
            if state.alive and state.generation == generation:
                self._look_at(state)
        if self.intake is not None:
            self.intake.send()
        self.reclaimer.reclaim(demand=self._wheel.due_within(_AHEAD))
        # vLLM admits nobody in a step in which memory was short. If it did, somebody has reset it.
        short = bool(output.preempted_req_ids) and not output.scheduled_cached_reqs.resumed_req_ids
        self.admission.advance(preempted=short)
        self.recorder.explainer.tell(self.tables.free, self.tables.total)
        return SchedulerMessage(
            remaps=self.reclaimer.take_remaps(),
            batches=self.jobs.take() if self.jobs is not None else (),
            tables=self._begin_check(),
        )

    def before_preemption(self) -> bool:
        """vLLM finds no block for a running request; true if reclaiming has freed some.

        vLLM then lets the request wait for the next step, but, as nothing was preempted, would give
        the freed blocks to waiting requests in this one. So admission is closed until then.
        """
        freed = self.reclaimer.before_preemption()
        if freed:
            self.admission.close()
        return freed

    def _forget_stages(self, state: RequestState) -> None:
        if self.intake is not None and self.jobs is not None:
            self.intake.forget(state)
            self.jobs.forget(state)

    def _note_schedule(self, output: SchedulerOutput) -> None:
        for request_id in output.preempted_req_ids or ():
            state = self.tracker.get(request_id)
            if state is None:
                continue
            self.recorder.preempted(state)
            state.note_held(state.full)
            self.reclaimer.forget(state, "preempted")
            self.admission.forget(state)
            self._forget_stages(state)
            self.tracker.start_generation(state)
        sent_whole = [new.req_id for new in output.scheduled_new_reqs]
        sent_whole += output.scheduled_cached_reqs.resumed_req_ids
        for request_id in sent_whole:
            state = self.tracker.get(request_id)
            if state is not None:
                state.sent_whole_at = self.recorder.step
                self._wheel.schedule((state, state.generation), 1)
                self.admission.grown(state)  # it may have been preempted and resumed at once

    def _look_at(self, state: RequestState) -> None:
        """Look at a request that may have filled a block since it was last looked at."""
        request, token_map = state.request, self.tables.token_map
        # Tokens whose KV is written: what is in flight is counted ahead (async scheduling).
        committed = request.num_computed_tokens - request.num_in_flight_tokens
        in_prompt = committed < request.num_prompt_tokens
        ticks = 1 if in_prompt else token_map.until_full(committed)
        self._wheel.schedule((state, state.generation), ticks)
        full = token_map.full(committed)
        if full == state.full:
            return
        state.full = full
        if self.intake is not None and self.jobs is not None:
            self.intake.feed(state, until=token_map.first_position(full))
            self.jobs.grown(state)
        self.reclaimer.release(state)
        self.admission.grown(state)

    def receive(self, message: WorkerMessage) -> None:
        """Take what the workers (all ranks that have answered, folded together) report."""
        if self.jobs is not None:
            self.jobs.receive(message.results)
        if message.remap_misses:
            self.recorder.counters.add("remap_misses", message.remap_misses)
            # The block is free, and a worker may still read it.
            self._report_check([f"workers did not know {message.remap_misses} remapped requests"])
        self._check_wanted |= message.check_wanted
        if message.table_faults is not None:
            self._report_check(message.table_faults)

    # ---- integrity ----

    def check_integrity(self) -> list[str]:
        """Compare our bookkeeping with vLLM's, on the scheduler side. [] if all is well."""
        faults = self.tables.reference_faults()
        for state in self.tracker:
            name, table = f"request {state.request_id}", self.tables.table(state.request_id)
            if table is None:
                continue
            if state.repointed and state.tainted_from is None:
                faults.append(f"{name}: remapped, but not tainted")
            if state.tainted_from is not None and self.tables.is_publishing(state.request_id):
                faults.append(f"{name}: tainted, but still publishing")
            if state.repointed and max(state.repointed) >= len(table):
                faults.append(f"{name}: a remapped entry is gone")
            elif not state.sharers_are_right(table):
                faults.append(f"{name}: a remapped entry points elsewhere than is noted")
        shared = sum(len(state.repointed) for state in self.tracker)
        if shared != self.reclaimer.shared_entries:
            faults.append(f"{self.reclaimer.shared_entries} shared entries counted, {shared} held")
        return faults

    def _begin_check(self) -> dict[str, list[int]] | None:
        """Check this side; returns the tables that the workers compare with theirs, if due."""
        every = self.config.integrity.check_every
        if not self._check_wanted and not (every and self.recorder.step % every == 0):
            return None
        self._check_wanted = False
        faults = self.check_integrity()
        if faults:
            self._report_check(faults)
        return self.tables.tables()

    def _report_check(self, faults: list[str]) -> None:
        result = "failed" if faults else "passed"
        listed = "; ".join(faults[:8])
        self.recorder.counters.add_labelled("integrity_checks", result)
        self.recorder.event("integrity", result=result, faults=listed)
        if not faults:
            return
        if self.config.integrity.on_failure == "raise":
            raise IntegrityError(f"MemShare integrity check failed: {listed}")
        self.reclaimer.enabled = False
        self._check_failed = True
        logger.error(
            "MemShare integrity check failed: %s. No further remaps; serving goes on.", listed
        )

    # ---- reporting ----

    def take_stats(self) -> Payload | None:
        """What has changed since the last call; None if nothing has."""
        self._census.look()
        return self.recorder.take_stats(
            {
                "queue_length": float(len(self.reclaimer)),
                "pairs_waiting": float(len(self.jobs)) if self.jobs is not None else 0.0,
                "shared_entries": float(self.reclaimer.shared_entries),
                "free_blocks": float(self.tables.free),
                "admission_reserve": float(self.admission.reserve),
                "sharing_stopped": float(self._check_failed),
            }
        )
