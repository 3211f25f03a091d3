"""An engine in this process whose budget changes from arm to arm, and whose tokens are forced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memshare.config import SelectionConfig
from memshare.mechanisms.selection.choice import PageChooser
from memshare.plug_in import plug_in

PAGE = 32  # tokens: the least that vLLM's attention on CPUs takes


class Arm:
    """One way to read pages.

    Attributes:
        name: for tables.
        config: its budget.
    """

    def __init__(self, name: str, **config: Any) -> None:
        self.name = name
        self.config = SelectionConfig(**config)


def best(fraction: float, exempt: int) -> Arm:
    """The best pages within a budget."""
    return Arm(f"best pages, {fraction:.0%}", budget=fraction, exempt_layers=exempt)


def newest(pages: int, fraction: float, exempt: int) -> Arm:
    """As many pages: the first, and the newest."""
    config = {"pages": pages, "first_pages": 1, "recent_pages": pages - 1, "exempt_layers": exempt}
    return Arm(f"newest pages, {fraction:.0%}", **config)


def everything(exempt: int) -> Arm:
    """Full attention, in the same engine: nothing is chosen."""
    return Arm("all pages", budget=1.0, exempt_layers=exempt)


class ForcingEngine:
    """vLLM with page selection. Prompts are in the prefix cache from the first arm on, exact."""

    def __init__(self, model: str, exempt: int, **options: Any) -> None:
        """Start it; ``options`` are vLLM's."""
        from vllm import LLM

        memshare = {
            "mode": "observe",
            "policy": {"name": "oldest"},
            "selection": {"budget": 1.0, "exempt_layers": exempt},
        }
        settings = {"block_size": PAGE, "enforce_eager": True, "seed": 0, "disable_log_stats": True}
        self.llm = LLM(model, **settings | options | plug_in(memshare))
        core = self.llm.llm_engine.engine_core.engine_core
        self.worker: Any = core.model_executor.driver_worker.worker
        self.selector: Any = self.worker._memshare._selector
        self.counters = core.scheduler.connector.scheduler_side.recorder.counters
        self._forced: list[int] = []
        self._seen: list[Tensor] = []
        self._patch()

    def use(self, arm: Arm) -> None:
        """Read pages so from now on."""
        pages = len(next(iter(self.selector._bounds.values())).highs)
        heads = self.selector.chooser.heads
        self.selector.chooser = PageChooser(arm.config, heads, PAGE, pages)
        self.counters.totals.clear()

    @property
    def read(self) -> float:
        """Pages read of those there, since the arm has begun."""
        totals = self.counters.totals
        return totals["pages_read"] / max(1, totals["pages_there"])

    def continue_with(
        self, prompt: Sequence[int], forced: Sequence[int], free: int
    ) -> tuple[list[int], Tensor]:
        """Generate ``forced``, whatever the model prefers, then ``free`` tokens of its own.

        Returns:
            The tokens after ``forced``, and the log-probabilities of the token behind each forced
            one, ``[forced, vocabulary]``: what was computed by attention that selects.
        """
        from vllm import SamplingParams

        self._forced, self._seen = list(forced), []
        count = len(forced) + free
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        (out,) = self.llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
        tokens = list(out.outputs[0].token_ids)
        assert tokens[: len(forced)] == list(forced)
        # The first row is the prompt's, which is read whole.
        return tokens[len(forced) :], torch.stack(self._seen[1 : len(forced)])

    def _patch(self) -> None:
        runner = self.worker.model_runner
        model, compute = runner.model, runner.model.compute_logits

        def compute_logits(hidden: Tensor) -> Tensor | None:
            logits: Tensor | None = compute(hidden)
            batch = runner.input_batch
            if logits is None or batch.num_reqs != 1:
                return logits
            known = batch.num_computed_tokens_cpu[0] + runner.query_start_loc.np[1]
            step = int(known - batch.num_prompt_tokens[0])
            if step >= 0:  # else a part of the prompt, whose logits nobody wants
                self._seen.append(logits[0].float().log_softmax(-1))
                if step < len(self._forced):
                    logits[0, self._forced[step]] = 1e9
            return logits

        model.compute_logits = compute_logits
