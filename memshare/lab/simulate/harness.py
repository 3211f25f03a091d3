"""vLLM's real scheduler with MemShare's real connector, and stand-ins for what needs a model.

For simulation, for tests of bookkeeping and for timing the step hook. The stand-in worker keeps
block tables as model runner V1 does, "writes" KV by labelling physical blocks, and answers
stage-two jobs with random similarities; two ranks answer in different steps, as a GPU may.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memshare.config import MemShareConfig
from memshare.core.rank_reducer import JobResult
from memshare.engine.adapter import vllm_adapter
from memshare.engine.messages import SchedulerMessage, WorkerMessage
from memshare.mechanisms.remap.messages import Batch, RemapCommands, RemapResults
from memshare.plug_in import plug_in
from memshare.search.evaluate import EvaluatorAnswer, EvaluatorError, InProcessSource, NewSteps

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

BLOCK = 32


@dataclass
class FakeWorker:
    """Block tables and block contents of a worker that computes nothing.

    Attributes:
        tables: physical block ids by request, as the worker believes them.
        written: how often each physical block has been given to a new owner and overwritten.
        expected: per request and entry, ``written`` of the block when the entry began to point to
            it; a difference means that somebody overwrote a block that is still in use.
        ranks: how many ranks answer a job.
        block_size: tokens.
        group: index of the KV cache group whose tables it keeps.
    """

    ranks: int = 1
    block_size: int = BLOCK
    seed: int = 0
    group: int = 0
    tables: dict[str, list[int]] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)
    expected: dict[str, list[int]] = field(default_factory=dict)
    late: dict[str, dict[int, JobResult]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def execute(self, output: SchedulerOutput) -> WorkerMessage:
        """Take one step's orders: remaps first, then new and changed requests."""
        message = output.kv_connector_metadata
        assert isinstance(message, SchedulerMessage)
        results = {name: RemapResults(late) for name, late in self.late.items()}
        self.late = {}
        for name, commands in message.commands.items():
            assert isinstance(commands, RemapCommands), "it fakes what remaps need, and no more"
            self._remap(commands, results.setdefault(name, RemapResults()))
        for request_id in output.finished_req_ids:
            self._forget_request(request_id)
        for request_id in output.preempted_req_ids or ():
            self._forget_request(request_id)
        pointed = [
            (n.req_id, 0, n.block_ids[self.group], n.num_computed_tokens)
            for n in output.scheduled_new_reqs
        ]
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            fresh = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                assert fresh is not None
                pointed.append((request_id, 0, fresh[self.group], cached.num_computed_tokens[i]))
            elif fresh is not None:
                pointed.append((request_id, len(self.tables[request_id]), fresh[self.group], 0))
        # All that this step writes is written before any entry is compared: of two requests that
        # come in together, one may already use the prefix that the other one writes.
        for _, start, blocks, computed in pointed:
            self._write(start, blocks, computed)
        for request_id, start, blocks, _ in pointed:
            self._point(request_id, start, blocks)
        for name, commands in message.commands.items():
            assert isinstance(commands, RemapCommands)
            for batch in commands.batches:
                self._compare(name, batch, results[name])
        answer = WorkerMessage(dict(results))
        if message.tables is not None:
            answer.table_faults = [
                f"{request_id}: {self.tables[request_id]} is not {blocks}"
                for request_id, blocks in message.tables.items()
                if request_id in self.tables and self.tables[request_id] != blocks
            ]
        return answer

    def overwritten(self) -> list[str]:
        """Entries whose block was overwritten while they pointed at it. Must be empty."""
        return [
            f"{request_id}[{i}] -> {block}"
            for request_id, table in self.tables.items()
            for i, block in enumerate(table)
            if self.expected[request_id][i] != self.written.get(block, 0)
        ]

    def _remap(self, commands: RemapCommands, results: RemapResults) -> None:
        for remap in commands.remaps:
            if remap.request_id not in self.tables:
                results.misses += 1
                continue
            self.tables[remap.request_id][remap.index] = remap.block_id
            self.expected[remap.request_id][remap.index] = self.written.get(remap.block_id, 0)

    def _compare(self, name: str, batch: Batch, results: RemapResults) -> None:
        """Answer a batch's jobs with random similarities, those of other ranks in the next step."""
        for job_id, pairs in batch.pairs_by_job().items():
            shares = [self._random.random() for _ in range(pairs)]
            results.results[job_id] = JobResult(list(shares), 1, 1)
            if self.ranks > 1:
                late = self.late.setdefault(name, {})
                late[job_id] = JobResult(list(shares), 1, self.ranks - 1)

    def _write(self, start: int, blocks: list[int], computed: int) -> None:
        """A new owner overwrites the blocks that begin an entry beyond ``computed`` tokens."""
        for i, block in enumerate(blocks, start):
            if (i + 1) * self.block_size > computed:
                self.written[block] = self.written.get(block, 0) + 1

    def _point(self, request_id: str, start: int, blocks: list[int]) -> None:
        """Entries from ``start`` on are ``blocks``."""
        table = self.tables.setdefault(request_id, [])
        expected = self.expected.setdefault(request_id, [])
        del table[start:], expected[start:]
        table.extend(blocks)
        expected.extend(self.written.get(block, 0) for block in blocks)

    def _forget_request(self, request_id: str) -> None:
        self.tables.pop(request_id, None)
        self.expected.pop(request_id, None)


class SynchronousBridge:
    """In place of ``memshare.search.bridge.EvaluatorBridge``: stage one is done when a step ends.

    So counts do not depend on how fast this machine is beside its engine steps, which take no time.
    """

    def __init__(self, config: MemShareConfig) -> None:
        """Make an evaluator."""
        self._source = InProcessSource(config)

    def submit(self, batch: list[NewSteps]) -> bool:
        """See ``EvaluatorBridge.submit``."""
        self._source.submit(batch)
        return True

    def forget_request(self, history: str, request_id: str) -> None:
        """See ``EvaluatorBridge.forget_request``."""
        if history == request_id:
            self._source.forget_histories([history], [])
        else:
            self._source.forget_histories([], [request_id])

    def drain(self) -> list[EvaluatorAnswer | EvaluatorError]:
        """See ``EvaluatorBridge.drain``."""
        return self._source.collect()

    def close(self) -> None:
        """See ``EvaluatorBridge.close``."""
        self._source.close()


class SchedulerHarness:
    """A scheduler that runs without a model."""

    def __init__(
        self,
        folder: Path,
        memshare: Mapping[str, object],
        blocks: int,
        max_num_seqs: int = 64,
        ranks: int = 1,
        seed: int = 0,
        block_size: int = BLOCK,
        max_model_len: int = 2048,
        max_num_batched_tokens: int = 2048,
        synchronous_search: bool = False,
    ) -> None:
        """Build it.

        Args:
            folder: model folder with ``config.json``, and a tokenizer if the policy has stages; no
                weights are read.
            memshare: MemShare's options, as in ``kv_connector_extra_config``.
            blocks: KV blocks, the null block included.
            max_num_seqs: requests that may run at once.
            ranks: ranks that answer stage-two jobs.
            seed: of the worker's similarities and of the tokens.
            block_size: tokens.
            max_model_len: tokens.
            max_num_batched_tokens: tokens that a step may compute.
            synchronous_search: see :class:`SynchronousBridge`.
        """
        from vllm.engine.arg_utils import EngineArgs

        self._random = random.Random(seed)
        self._block_size = block_size
        self.scheduler = _scheduler(
            EngineArgs(
                model=str(folder), block_size=block_size, max_model_len=max_model_len,
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
                enforce_eager=True, load_format="dummy",
                skip_tokenizer_init=not (folder / "tokenizer.json").exists(),
                **plug_in(memshare),
            ),
            blocks,
            ranks,
        )  # fmt: skip
        group = vllm_adapter().editable_group(self.scheduler.kv_cache_config)
        self.worker = FakeWorker(ranks, block_size, seed, group.index)
        stages = self.side.part.stages if self.side is not None else None
        if synchronous_search and stages is not None:
            stages.feeder.replace_bridge(SynchronousBridge(self.side.config))
        self._forced: dict[str, list[int]] = {}
        self._vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"] - 2

    @property
    def side(self) -> Any:
        """The connector's scheduler half."""
        return self.scheduler.connector.scheduler_side  # type: ignore[union-attr]

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        forced: list[int] | None = None,
        extra_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> Request:
        """Add a request that writes ``max_tokens`` tokens: ``forced`` ones, or random ones.

        ``extra_args`` are MemShare's per-request options, ``options`` those of vLLM's ``Request``.
        """
        from vllm import SamplingParams
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        caching_hash = get_hash_fn_by_name("sha256")
        init_none_hash(caching_hash)
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, temperature=0, extra_args=extra_args
        )
        params.update_from_generation_config({}, eos_token_id=None)
        request = Request(
            request_id, prompt, params, None,
            block_hasher=get_request_block_hasher(self._block_size, caching_hash), **options,
        )  # fmt: skip
        if forced is not None:
            self._forced[request_id] = forced
        self.scheduler.add_request(request)
        return request

    def step(self) -> SchedulerOutput:
        """One engine step: schedule, "execute", take the outcome."""
        output = self.scheduler.schedule()
        self.finish_step(output)
        return output

    def finish_step(self, output: SchedulerOutput) -> None:
        """Execute and process a scheduled step."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        answer = self.worker.execute(output)
        ids = list(output.num_scheduled_tokens)
        sampled = []
        for request_id in ids:
            request = self.scheduler.requests[request_id]
            done = request.num_computed_tokens >= request.num_tokens
            sampled.append([self._token(request)] if done else [])
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
                sampled_token_ids=sampled,
                kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=answer),
            ),
        )

    def _token(self, request: Request) -> int:
        forced = self._forced.get(request.request_id)
        return (
            self._random.randrange(self._vocabulary)
            if forced is None
            else forced[request.num_output_tokens]
        )

    def close(self) -> None:
        """Stop MemShare's threads."""
        self.scheduler.shutdown()


def _scheduler(args: EngineArgs, blocks: int, ranks: int) -> Scheduler:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    config.parallel_config.world_size = ranks  # of the stand-in worker; nothing is started
    size = config.cache_config.block_size
    spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=size,
        hash_block_size=size,
        log_stats=True,
    )
