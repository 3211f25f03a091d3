"""What a step of vLLM's scheduler means for block tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memshare.core.interfaces import Admission, BlockGrowth, Scheduled

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


def read_growth(output: SchedulerOutput) -> BlockGrowth:
    """See :meth:`Adapter.read_growth`. Of a family's cache, which has one group of layers."""
    admitted = [
        Admission(
            new.req_id,
            None if new.lora_request is None else new.lora_request.lora_name,
            new.block_ids[0],
            new.num_computed_tokens,
        )
        for new in output.scheduled_new_reqs
    ]
    grown: list[tuple[str, list[int]]] = []
    cached = output.scheduled_cached_reqs
    for index, (request_id, new_blocks) in enumerate(
        zip(cached.req_ids, cached.new_block_ids, strict=True)
    ):
        if new_blocks is None:
            continue  # most requests, in most steps
        if request_id in cached.resumed_req_ids:
            found = cached.num_computed_tokens[index]
            admitted.append(Admission(request_id, None, new_blocks[0], found))
        else:
            grown.append((request_id, new_blocks[0]))
    return BlockGrowth(admitted, grown)
