"""What a step of vLLM's scheduler means for block tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memshare.core.interfaces import Scheduled

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_NOTHING_NEW = Scheduled((), (), False)  # most steps


def read_schedule(output: SchedulerOutput) -> Scheduled:
    """See :meth:`Adapter.read_schedule`. New requests and resumed ones are sent whole."""
    resumed = output.scheduled_cached_reqs.resumed_req_ids
    if not (output.scheduled_new_reqs or output.preempted_req_ids or resumed):
        return _NOTHING_NEW
    sent_whole = [new.req_id for new in output.scheduled_new_reqs]
    sent_whole += resumed
    return Scheduled(tuple(output.preempted_req_ids or ()), sent_whole, bool(resumed))
