"""The connector's scheduler half: one call per engine step, from new tokens to reclaimed blocks.

A step runs through :meth:`SchedulerSide.build_message` in this order: forget what was preempted,
let mechanisms take what evaluators have found, look at requests that have filled a block, reclaim,
and hand the mechanisms' commands to the workers. Results come back through
:meth:`SchedulerSide.receive`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from memshare.config import MemShareConfig, registry
from memshare.core.admission import Admission
from memshare.core.interfaces import BlockTables, EngineRequest, Scheduled
from memshare.core.reclaimer import Reclaimer
from memshare.core.request_tracker import RequestTracker
from memshare.core.requests import RequestState
from memshare.core.timing_wheel import TimingWheel
from memshare.engine.messages import SchedulerMessage, WorkerMessage
from memshare.engine.usage import ReturnedUsage, returned_usage
from memshare.mechanisms.contract import SchedulerContext, SchedulerPart
from memshare.search.bridge import EvaluatorBridge
from memshare.search.steps import DelimiterAutomaton
from memshare.telemetry.block_census import BlockCensus
from memshare.telemetry.recorder import Recorder
from memshare.telemetry.stats import DropReason, Payload

logger = logging.getLogger(__name__)

# Engine steps whose demand for blocks is met in advance. Two, because a request's first loss must
# not fall into the step that completes a block (RequestTracker.must_wait), which is the last before
# it wants the next one.
_AHEAD = 2


class IntegrityError(RuntimeError):
    """Our bookkeeping and vLLM's differ. The text lists the differences."""


class SchedulerSide:
    """The scheduler half. Every method is called on the engine's thread.

    Attributes:
        parts: the mechanisms' scheduler parts by policy name.
    """

    def __init__(
        self,
        config: MemShareConfig,
        tables: BlockTables,
        world_size: int,
        unsettled_tokens: int,
        compile_steps: Callable[[], DelimiterAutomaton],
        open_bridge: Callable[[], EvaluatorBridge],
    ) -> None:
        """Take hold of the block tables; start mechanisms and event log.

        Args:
            config: a valid configuration whose mode is not ``off``.
            tables: the scheduler's block tables.
            world_size: ranks whose partial results make a whole one.
            unsettled_tokens: how many of a request's last committed tokens may yet be written
                again; blocks with one of them are not full.
            compile_steps: compiles the step delimiters; called only if a mechanism needs steps.
            open_bridge: makes the bridge to the evaluators; called only if a mechanism needs them.
        """
        self.config = config
        self.tables = tables
        self.recorder = Recorder(config)
        self.tracker = RequestTracker(config, tables)
        context = SchedulerContext(
            config, tables, self.tracker, self.recorder, world_size, self._report_check,
            compile_steps, open_bridge,
        )  # fmt: skip
        self.parts: dict[str, SchedulerPart] = {
            name: mechanism.scheduler_part(context)
            for name, mechanism in registry.mechanisms_of(config).items()
        }
        self._parts = tuple(self.parts.values())
        self.reclaimer = Reclaimer(config, self._parts, self.tracker, tables, self.recorder)
        self.admission = Admission(config, self.tracker, self.reclaimer, tables)
        self._census = BlockCensus(config.report, self.tracker, tables, self.recorder.counters)
        self._wheel: TimingWheel[tuple[RequestState, int]] = TimingWheel()  # state, generation
        self._unsettled = unsettled_tokens
        self._full_and_left = tables.token_map.full_and_left  # for each request that is looked at
        self._check_wanted = False
        self._check_failed = False
        self.recorder.event(
            "started", blocks=tables.total, mode=config.mode, policy=config.policy.name
        )

    @property
    def part(self) -> SchedulerPart:
        """The part of the policy that the configuration names."""
        return self.parts[self.config.policy.name]

    def close(self) -> None:
        """Stop threads and close files. Idempotent."""
        for part in self._parts:
            part.close()
        self.recorder.close()

    def workers_are_ready(self) -> None:
        """Every rank can edit its table, so blocks may be reclaimed from now on."""
        self.reclaimer.enabled = self.config.mode == "share"

    # ---- requests come and go ----

    def follow(self, request: EngineRequest) -> None:
        """Begin to follow a request, unless it must stay exact."""
        reason = self.tracker.follow(request)
        if reason is not None:
            self.recorder.counters.add_labelled("opted_out", reason)
            self.recorder.event("opted_out", request=request.request_id, reason=reason)

    def finish(self, request: EngineRequest) -> ReturnedUsage | None:
        """Stop following a request; vLLM frees its blocks right after this call.

        Returns:
            What goes back with its last output; None if it has not asked for anything.
        """
        request_id = request.request_id
        state = self.tracker.unfollow(request_id)
        usage = returned_usage(request, state, self.tables.entries(request_id))
        if state is None:
            return usage
        self.recorder.event(
            "finished", request=request_id, shared=len(state.repointed), dropped=len(state.holes)
        )
        self._forget_blocks(state, "finished")
        return usage

    def waits(self, request: EngineRequest) -> None:
        """vLLM is about to admit the request, if its blocks fit."""
        self.admission.waits(request)

    def admitted(self, request_id: str) -> None:
        """vLLM has given blocks to a request that was waiting."""
        self.tracker.unsent.add(request_id)
        self.admission.admitted(self.tracker.get(request_id))

    def _forget_blocks(self, state: RequestState, reason: DropReason) -> None:
        for part in self._parts:
            part.on_gone(state, reason)
        self.admission.discount(state)

    # ---- one engine step ----

    def build_message(self, scheduled: Scheduled) -> SchedulerMessage:
        """Run one step of MemShare; called when vLLM has scheduled, before it executes."""
        self.recorder.step += 1
        self.tracker.step = self.recorder.step
        self._note_schedule(scheduled)
        for part in self._parts:
            part.begin_step()
        for due in self._wheel.advance():  # those that may have filled a block since
            state, generation = due
            if state.alive and state.generation == generation:
                self._wheel.schedule(due, self._note_filled(state))
        demand = self.reclaimer.demand(self._wheel.due_within(_AHEAD))
        self.reclaimer.reclaim(demand)
        shortage = self.admission.shortage(demand)
        if shortage:
            self.reclaimer.make_room(shortage)
        # vLLM admits nobody in a step in which memory was short. If it did, somebody has reset it.
        self.admission.advance(preempted=bool(scheduled.preempted) and not scheduled.resumed)
        self.recorder.explainer.tell(self.tables.free, self.tables.total)
        commands = {}
        for name, part in self.parts.items():
            wanted = part.commands()
            if wanted is not None:
                commands[name] = wanted
        return SchedulerMessage(commands, self._begin_check())

    def before_preemption(self) -> bool:
        """vLLM finds no block for a running request; true if reclaiming has freed some.

        vLLM then lets the request wait for the next step, but, as nothing was preempted, would give
        the freed blocks to waiting requests in this one. So admission is closed until then.
        """
        if self.config.drops_tokens:  # what is full may be given up; others search it first
            unsent = self.tracker.unsent
            for state in self.tracker:
                if self.tables.table(state.request_id) is None or state.request_id in unsent:
                    continue  # preempted in this step, or not begun
                self._note_filled(state)  # who wants a block has just filled one
        freed = self.reclaimer.before_preemption()
        if freed:
            self.admission.close()
        return freed

    def _note_schedule(self, scheduled: Scheduled) -> None:
        for request_id in scheduled.preempted:
            state = self.tracker.get(request_id)
            if state is None:
                continue
            self.recorder.preempted(state)
            state.note_held(state.full)
            self._forget_blocks(state, "preempted")
            state.start_generation()
        self.tracker.unsent.difference_update(scheduled.sent_whole)
        for request_id in scheduled.sent_whole:
            state = self.tracker.get(request_id)
            if state is not None:
                state.sent_whole_at = self.tracker.step
                self._wheel.schedule((state, state.generation), 1)
                self.admission.grown(state)  # it may have been preempted and resumed at once

    def _note_filled(self, state: RequestState) -> int:
        """Take note of blocks that the request has filled; returns in how many steps, at least one,
        to look again."""
        request = state.request
        # Tokens whose KV is written: what is in flight is counted ahead (async scheduling).
        committed = request.num_computed_tokens - request.num_in_flight_tokens
        full, left = self._full_and_left(max(0, committed - self._unsettled))
        if full != state.full:
            state.full = full
            for part in self._parts:
                part.on_tokens(state)
            self.admission.grown(state)
        return left if committed >= request.num_prompt_tokens else 1

    def receive(self, message: WorkerMessage) -> None:
        """Take what the workers (all ranks that have answered, folded together) report."""
        for name, results in message.results.items():
            self.parts[name].on_results(results)
        self._check_wanted |= message.check_wanted
        if message.table_faults is not None:
            self._report_check(message.table_faults)

    # ---- integrity ----

    def check_integrity(self) -> list[str]:
        """Compare our bookkeeping with vLLM's, on the scheduler side. [] if all is well."""
        faults = self.tables.reference_faults()
        faults += [
            f"request {state.request_id}: tainted, but still publishing"
            for state in self.tracker
            if state.tainted_from is not None
            and self.tables.table(state.request_id) is not None
            and self.tables.is_publishing(state.request_id)
        ]
        for part in self._parts:
            faults += part.faults()
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
        tables = self.tables.block_ids()
        # Workers have not heard of these blocks; of a preempted request they remember others.
        return {each: ids for each, ids in tables.items() if each not in self.tracker.unsent}

    def _report_check(self, faults: Sequence[str]) -> None:
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
            "MemShare integrity check failed: %s. Nothing more is reclaimed; serving goes on.",
            listed,
        )

    # ---- reporting ----

    def take_stats(self) -> Payload | None:
        """What has changed since the last call; None if nothing has."""
        self._census.look()
        gauges = {
            "free_blocks": float(self.tables.free),
            "admission_reserve": float(self.admission.reserve),
            "sharing_stopped": float(self._check_failed),
        }
        for part in self._parts:
            gauges.update(part.gauges())
        return self.recorder.take_stats(gauges)
