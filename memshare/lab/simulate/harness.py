"""vLLM's real scheduler with MemShare's real connector, and stand-ins for what needs a model.

For simulation, for tests of bookkeeping and for timing the step hook. The stand-in for the workers
is ``fake_worker``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memshare.config import MemShareConfig
from memshare.engine.adapter import vllm_adapter
from memshare.lab.simulate.fake_worker import FakeWorker
from memshare.mechanisms.remap.scheduler import RemapPart
from memshare.plug_in import plug_in
from memshare.search.evaluate import EvaluatorAnswer, EvaluatorError, InProcessSource, NewSteps

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

BLOCK = 32


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
        watermark: float = 0.0,
        window: int | None = None,
        states: int = 0,
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
            watermark: vLLM's own.
            window: tokens that a second group of layers attends to, which stands before the one
                with full attention; None: there is none.
            states: how many groups with linear attention stand before it, too.
        """
        from vllm.engine.arg_utils import EngineArgs

        self._random = random.Random(seed)
        self._block_size = block_size
        self.scheduler = _scheduler(
            EngineArgs(
                model=str(folder), block_size=block_size, max_model_len=max_model_len,
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
                enforce_eager=True, load_format="dummy", watermark=watermark,
                skip_tokenizer_init=not (folder / "tokenizer.json").exists(),
                **plug_in(memshare),
            ),
            blocks,
            ranks,
            window,
            states,
        )  # fmt: skip
        group = vllm_adapter().editable_group(self.scheduler.kv_cache_config)
        self.worker = FakeWorker(ranks, block_size, seed, group.index)
        if self.side is not None:
            self.side.workers_are_ready()  # as a real one reports by its handshake
        part = self.side.part if self.side is not None else None
        stages: Any = part.stages if isinstance(part, RemapPart) else None
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


def _scheduler(
    args: EngineArgs, blocks: int, ranks: int, window: int | None, states: int
) -> Scheduler:
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
    )
    from vllm.v1.structured_output import StructuredOutputManager

    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    config.parallel_config.world_size = ranks  # of the stand-in worker; nothing is started
    size = config.cache_config.block_size
    heads: dict[str, Any] = {
        "block_size": size, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32,
    }  # fmt: skip
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**heads))]
    if window is not None:
        sliding = SlidingWindowSpec(**heads, sliding_window=window)
        groups.insert(0, KVCacheGroupSpec(["sliding"], sliding))
    for group in range(states):
        state = MambaSpec(
            block_size=size, shapes=((1, 1),), dtypes=(torch.float32,), mamba_cache_mode="align",
            mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
        )  # fmt: skip
        groups.insert(0, KVCacheGroupSpec([f"state.{group}"], state))
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=size,
        hash_block_size=size,
        log_stats=True,
    )
