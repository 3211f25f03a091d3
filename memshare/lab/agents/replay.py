"""Replays conversations with switches of roles, in an engine in this process."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memshare.agents.adapter import adapters_by_name
from memshare.agents.base import facts_of
from memshare.agents.family import Family
from memshare.agents.memory import plain, widened
from memshare.config import AgentsConfig
from memshare.core.token_map import TokenMap
from memshare.engine.agents import layout_of
from memshare.lab.agents.turns import ReplayPlan, Turn
from memshare.lab.bench.engine_process import ProgressTeller
from memshare.lab.replay.forced import ForcedDecoding, Measurement, forced
from memshare.plug_in import plug_in

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True, slots=True)
class TurnRun:
    """How one turn went.

    Attributes:
        conversation: its number.
        turn: its number in the conversation.
        role: whose it was.
        switched: whether another role had the turn before.
        prompt: tokens.
        cached: tokens of the prompt that were found in the cache.
        first: seconds of CPU time until the first token; of all turns that ran meanwhile.
    """

    conversation: int
    turn: int
    role: str
    switched: bool
    prompt: int
    cached: int
    first: float


@dataclass(frozen=True, slots=True)
class SchemeRun:
    """How all conversations went under one scheme.

    Attributes:
        scheme: its name.
        turns: one by one, as they ended.
        steps: of the engine.
        cpu: seconds of CPU time.
        seconds: on the clock.
        computed: tokens that the engine computed.
        preemptions: of requests.
        blocks: of KV memory that was there.
        kept: blocks that may be found at the end: all that was cached, if nothing had to go.
        block_bytes: of a block.
    """

    scheme: str
    turns: list[TurnRun]
    steps: int
    cpu: float
    seconds: float
    computed: int
    preemptions: int
    blocks: int
    kept: int
    block_bytes: int


def distributions(folder: str, conversation: int, turn: int, scheme: str) -> str:
    """The file of a turn's measurements, or of exact distributions under ``nonshared``."""
    return f"{folder}/{scheme}-{conversation}-{turn}"


EXACT = "nonshared"


def run_scheme(argument: dict[str, Any]) -> dict[str, Any]:
    """Replay a plan (see :mod:`memshare.lab.bench.engine_process`)."""
    plan = ReplayPlan.load(Path(argument["plan"]))
    return asdict(replay(plan, argument["scheme"]))


def replay(plan: ReplayPlan, scheme: str) -> SchemeRun:
    """Let roles take turns in all conversations, and write what was recorded.

    Args:
        plan: what is replayed.
        scheme: of ``agents.scheme``.
    """
    return _Replay(plan, scheme).run()


class _Replay:
    """Conversations, an engine, and what has happened so far."""

    def __init__(self, plan: ReplayPlan, scheme: str) -> None:
        self._plan, self._scheme = plan, scheme
        llm, self._blocks = _start(plan, scheme)
        self._engine = llm.llm_engine
        core: Any = self._engine.engine_core
        self._scheduler: Any = core.engine_core.scheduler
        self._schedule = self._scheduler.schedule
        self._scheduler.schedule = self._watched
        self._computed = self._preemptions = self._written = 0
        self._begun: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._turns: list[TurnRun] = []

    def _watched(self, *args: Any) -> Any:
        output = self._schedule(*args)
        self._computed += output.total_num_scheduled_tokens
        self._preemptions += len(output.preempted_req_ids or ())
        return output

    def run(self) -> SchemeRun:
        waiting = deque(range(len(self._plan.conversations)))
        steps, teller = 0, ProgressTeller()
        cpu, clock = time.process_time(), time.perf_counter()
        for _ in range(min(self._plan.at_once, len(waiting))):
            self._ask(waiting.popleft(), 0)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            steps += 1
            for output in outputs:
                self._look(output, waiting)
            teller.tell(
                written=self._written, total=self._plan.written, ended=len(self._turns),
                requests=sum(map(len, self._plan.conversations)),
            )  # fmt: skip
        pool, config = self._scheduler.kv_cache_manager.block_pool, self._scheduler.kv_cache_config
        return SchemeRun(
            scheme=self._scheme,
            turns=self._turns,
            steps=steps,
            cpu=time.process_time() - cpu,
            seconds=time.perf_counter() - clock,
            computed=self._computed,
            preemptions=self._preemptions,
            blocks=self._blocks,
            kept=len(pool.cached_block_hash_to_block),
            block_bytes=sum(t.size for t in config.kv_cache_tensors) // config.num_blocks,
        )

    def _ask(self, conversation: int, number: int) -> None:
        """Begin a turn. A salt of its own keeps each conversation from finding others' blocks."""
        from vllm.lora.request import LoRARequest

        turn = self._plan.conversations[conversation][number]
        roles = list(self._plan.adapters)
        lora = LoRARequest(turn.role, roles.index(turn.role) + 1, self._plan.adapters[turn.role])
        name = f"{conversation}-{number}"
        prompt: Any = {"prompt_token_ids": turn.prompt, "cache_salt": f"salt-{conversation}"}
        params = forced(turn.output, self._measurement(conversation, number, turn))
        self._begun[name] = time.process_time()
        self._engine.add_request(name, prompt, params, lora_request=lora)

    def _measurement(self, conversation: int, number: int, turn: Turn) -> Measurement | None:
        if not self._plan.measured:
            return None
        exact, ours = (
            distributions(self._plan.folder, conversation, number, scheme)
            for scheme in (EXACT, self._scheme)
        )
        return Measurement(0, len(turn.output), exact, None if self._scheme == EXACT else ours)

    def _look(self, output: Any, waiting: deque[int]) -> None:
        """Take what a step has brought; where a turn has ended, the next one begins."""
        name = output.request_id
        self._first.setdefault(name, time.process_time() - self._begun[name])
        if not output.finished:
            return
        conversation, number = map(int, name.split("-"))
        turns = self._plan.conversations[conversation]
        turn = turns[number]
        self._written += len(turn.output)
        self._turns.append(
            TurnRun(
                conversation, number, turn.role, number > 0 and turns[number - 1].role != turn.role,
                len(turn.prompt), output.num_cached_tokens or 0, self._first[name],
            )
        )  # fmt: skip
        if number + 1 < len(turns):
            self._ask(conversation, number + 1)
        elif waiting:
            self._ask(waiting.popleft(), 0)


def _start(plan: ReplayPlan, scheme: str) -> tuple[LLM, int]:
    """An engine, warmed up by each adapter, and how many blocks it has."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    memshare = {"mode": "off", "agents": {"scheme": scheme, "adapters": plan.adapters}}
    blocks = _blocks(plan, scheme)
    llm = LLM(
        plan.model,
        dtype=plan.dtype,  # type: ignore[arg-type]
        max_model_len=plan.longest + 1,
        max_num_seqs=plan.at_once,
        max_num_batched_tokens=plan.step_tokens,
        enable_chunked_prefill=True,
        block_size=plan.block_size,
        num_gpu_blocks_override=blocks,
        enforce_eager=True,
        seed=0,
        logits_processors=[ForcedDecoding],
        **plug_in(memshare),
    )
    first: Any = {"prompt_token_ids": plan.conversations[0][0].prompt[:8]}
    for number, (role, folder) in enumerate(plan.adapters.items(), start=1):
        lora = LoRARequest(role, number, folder)
        llm.generate([first], SamplingParams(max_tokens=2), use_tqdm=False, lora_request=lora)
    llm.reset_prefix_cache()
    return llm, blocks


def _blocks(plan: ReplayPlan, scheme: str) -> int:
    """KV blocks of a scheme: of the same bytes for all, or more than are needed."""
    token_map = TokenMap(plan.block_size)
    if plan.kv_tokens is None:
        turns = sum(map(len, plan.conversations))
        return token_map.full(plan.tokens) + 2 * turns + 1
    return 1 + token_map.full(int(plan.kv_tokens * _plain_per_token(plan, scheme)))


def _plain_per_token(plan: ReplayPlan, scheme: str) -> float:
    """Tokens of the base model's cache that take the bytes of one of a scheme's."""
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    config = AgentsConfig.model_validate({"scheme": scheme, "adapters": plan.adapters})
    if not config.widens_values:
        return 1.0
    base = facts_of(plan.model, AutoConfig.from_pretrained(plan.model))
    width = Family(scheme, tuple(adapters_by_name(config.adapters)), "").width
    layout = layout_of(base, width, on_gpu=not current_platform.is_cpu())
    wide = widened(base, width) if layout is None else layout  # without one the engine refuses
    return plain(base).bytes_per_token(base, 1) / wide.bytes_per_token(base, 1)
