"""What must not change a token, and the proof that a change would be noticed.

- Modes ``off`` and ``observe`` write what plain vLLM writes.
- Copies of one prompt write the same text, so that every block has identical twins at the same
  position in other requests. Sharing only those changes nothing.
- Negative control: if no worker is told of the scheduler's remaps, the text does change.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from memshare.lab.bench.engine_process import call_in_process
from memshare.mechanisms.contract import WorkerPart

if TYPE_CHECKING:
    from memshare.core.rank_reducer import Reducible
    from memshare.engine.connector import MemShareConnector
    from memshare.engine.worker_side import WorkerSide

BLOCK_SIZE = 32
COPIES = 10
PROMPT = (
    "Add the numbers 17, 25, 8, 42 and 13 step by step. Write every step as its own paragraph, "
    "check it, and write the next step."
)
# Others run beside the copies, so that a freed block is soon overwritten with something else.
OTHERS = [f"Tell me a story about {what}." for what in ("a fox", "the sea", "a train", "an owl")]
IDENTICAL_ONLY: dict[str, Any] = {
    "policy": {"name": "paper"},
    "scope": "tenant",
    "trigger": {"kind": "eager"},
    "steps": {"similarity_threshold": 1.0, "min_tokens": 8, "max_tokens": 48, "max_matches": 8},
    "distance": {"similarity_threshold": 1.0, "max_jobs_per_step": 64, "layers": "all"},
    "protect": {"recent_tokens": 0},
    "budget": {"max_shared_fraction": 1.0},
    # All at once, so that freed blocks are soon overwritten: the negative control lives on that.
    "admission": {"lookahead_tokens": 0},
}


@dataclass(frozen=True, slots=True)
class ExactnessEngine:
    """The engine that is asked.

    Attributes:
        model: folder or hub id.
        dtype: of weights and cache.
        tensor_parallel_size: ranks.
        eager: vLLM's ``enforce_eager``.
        batch_invariant: kernels whose results don't depend on the batch, on GPUs.
        tokens: that every request writes.
        blocks: KV blocks, too few for all copies without sharing.
    """

    model: str
    dtype: str
    tensor_parallel_size: int
    eager: bool
    batch_invariant: bool
    tokens: int = 128
    blocks: int = 50


class Written(NamedTuple):
    """What one arm wrote.

    Attributes:
        outputs: token ids of every copy.
        applied: remaps.
        clean: whether every block was free again at the end.
    """

    outputs: list[list[int]]
    applied: int
    clean: bool


class Verdict(NamedTuple):
    """One claim.

    Attributes:
        claim: what must hold.
        holds: whether it does.
        seen: the figures behind it.
    """

    claim: str
    holds: bool
    seen: str


def check(engine: ExactnessEngine) -> list[Verdict]:
    """Run all arms, each in a process of its own.

    Raises:
        UserError: an engine failed.
    """
    plain = ask(engine, None)
    verdicts = []
    for mode in ("off", "observe"):
        same = _same(ask(engine, {"mode": mode}).outputs, plain.outputs)
        verdicts.append(
            Verdict(f"mode `{mode}` writes what plain vLLM writes", same == COPIES, _of(same))
        )
    shared = ask(engine, IDENTICAL_ONLY)
    same = _same(shared.outputs, plain.outputs)
    verdicts += [
        Verdict(
            "sharing identical blocks changes no token",
            same == COPIES and shared.applied >= COPIES,
            f"{_of(same)}, {shared.applied} remaps",
        ),
        Verdict("every block is free again", shared.clean, "yes" if shared.clean else "no"),
    ]
    if engine.tensor_parallel_size == 1:
        wrong = ask(engine, IDENTICAL_ONLY, forget=True)
        same = _same(wrong.outputs, plain.outputs)
        verdicts.append(
            Verdict(
                "negative control: remaps that no worker hears of do change tokens",
                same < COPIES and wrong.applied >= COPIES,
                f"{_of(same)}, {wrong.applied} remaps",
            )
        )
    return verdicts


class _Uninformed(WorkerPart):
    """A mechanism's worker part that never hears of a remap: the fault of the negative control."""

    def __init__(self, part: WorkerPart) -> None:
        self._part = part

    def before_step(self, commands: Any) -> None:
        """See :meth:`WorkerPart.before_step`."""
        self._part.before_step(replace(commands, remaps=()))

    def after_step(self) -> Reducible | None:
        """See :meth:`WorkerPart.after_step`."""
        return self._part.after_step()


def tell_of_no_remap(side: WorkerSide) -> None:
    """Plant that fault in a rank: from now on its table is not edited."""
    side.parts.update({name: _Uninformed(part) for name, part in side.parts.items()})


def _of(same: int) -> str:
    return f"{same} of {COPIES} outputs identical"


def _same(outputs: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> int:
    return sum(list(a) == list(b) for a, b in zip(outputs, expected, strict=True))


def ask(engine: ExactnessEngine, memshare: dict[str, Any] | None, forget: bool = False) -> Written:
    """Run one arm in a process of its own.

    Args:
        engine: that is asked.
        memshare: MemShare's options; None is plain vLLM.
        forget: the negative control: no worker hears of a remap.

    Raises:
        UserError: the engine failed.
    """
    argument = {"engine": asdict(engine), "memshare": memshare, "forget": forget}
    name = "plain vLLM" if memshare is None else f"MemShare with {memshare}"
    return Written(
        *call_in_process(f"{__name__}:write", argument, f"the engine of {name}", engine.model)
    )


def write(argument: dict[str, Any]) -> Written:
    """Run one arm in this process (see :mod:`memshare.lab.bench.engine_process`)."""
    engine = ExactnessEngine(**argument["engine"])
    if engine.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"

    from vllm import LLM, SamplingParams

    from memshare.plug_in import plug_in

    options: dict[str, Any] = {
        "dtype": engine.dtype, "tensor_parallel_size": engine.tensor_parallel_size,
        "enforce_eager": engine.eager, "block_size": BLOCK_SIZE, "max_model_len": 1024,
        "num_gpu_blocks_override": engine.blocks, "seed": 0,
    }  # fmt: skip
    llm = LLM(engine.model, **options, **plug_in(argument["memshare"]))
    core: Any = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    if argument["forget"]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        side = cast("MemShareConnector", get_kv_transfer_group()).worker_side
        assert side is not None
        tell_of_no_remap(side)
    params = SamplingParams(max_tokens=engine.tokens, temperature=0, ignore_eos=True)
    found = llm.generate([PROMPT] * COPIES + OTHERS, params, use_tqdm=False)
    outputs = [list(output.outputs[0].token_ids) for output in found[:COPIES]]
    side = getattr(core.scheduler.connector, "scheduler_side", None)
    applied = 0 if side is None else int(side.recorder.counters.totals.get("applied", 0))
    pool = core.scheduler.kv_cache_manager.block_pool
    clean = pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return Written(outputs, applied, clean and llm.reset_prefix_cache())
