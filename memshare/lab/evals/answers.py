"""A model's answers: from an engine in its own process, or from a server over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from memshare.errors import UserError
from memshare.lab.bench.arms import Arm
from memshare.lab.bench.engine_process import OnProgress, call_in_process
from memshare.lab.bench.progress import follow
from memshare.request_options import USAGE

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_ASK_USAGE = {USAGE: "on"}


class ModelAnswer(NamedTuple):
    """One sample.

    Attributes:
        text: all that the model wrote.
        tokens: how many tokens that was.
        cut: whether the limit of tokens ended it.
        given_up: KV blocks that it has given up; 0 if it is the model's own, exactly.
    """

    text: str
    tokens: int
    cut: bool = False
    given_up: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        samples: answers to each question.
        max_tokens: generated tokens at most.
        temperature: 0 takes the most likely token.
        top_p: of nucleus sampling.
        seed: of the first sample; each next one has the next.
    """

    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """An engine of our own.

    Attributes:
        model: folder or hub id.
        dtype: of weights and cache.
        max_model_len: tokens.
        blocks: KV blocks of ``block_size`` tokens in ``dtype``: an arm with a narrower cache has as
            many bytes, so more blocks. None takes what the machine has.
        tensor_parallel_size: ranks.
        eager: vLLM's ``enforce_eager``: starts at once, and nothing is compiled.
    """

    model: str
    dtype: str
    max_model_len: int
    block_size: int
    blocks: int | None
    tensor_parallel_size: int
    eager: bool


def from_engine(
    prompts: Sequence[str], sampling: Sampling, engine: EngineSettings, arm: Arm, folder: Path,
    on_progress: OnProgress,
) -> list[list[ModelAnswer]]:  # fmt: skip
    """Return ``samples`` answers to each prompt; ``on_progress`` is told how far they are.

    Raises:
        UserError: the engine failed.
    """
    work = folder / "questions.json"
    work.write_text(json.dumps(list(prompts)))
    argument = {
        "prompts": str(work), "sampling": asdict(sampling), "engine": asdict(engine),
        "arm": asdict(arm),
    }  # fmt: skip
    name = f"the engine of {arm.name}"
    found = call_in_process(f"{__name__}:run_engine", argument, name, engine.model, on_progress)
    return [[ModelAnswer(*answer) for answer in answers] for answers in found]


def run_engine(argument: dict[str, Any]) -> list[list[ModelAnswer]]:
    """Answer all prompts in this process (see :mod:`memshare.lab.bench.engine_process`)."""
    from vllm import LLM, SamplingParams

    from memshare.plug_in import plug_in

    engine, arm = EngineSettings(**argument["engine"]), Arm(**argument["arm"])
    sampling = Sampling(**argument["sampling"])
    blocks = None if engine.blocks is None else arm.blocks(engine.blocks, engine.dtype)
    options: dict[str, Any] = {
        "dtype": engine.dtype, "max_model_len": engine.max_model_len,
        "block_size": engine.block_size, "num_gpu_blocks_override": blocks,
        "tensor_parallel_size": engine.tensor_parallel_size, "kv_cache_dtype": arm.kv_dtype,
        "enforce_eager": engine.eager, "watermark": arm.watermark,
    }  # fmt: skip
    llm = LLM(engine.model, seed=0, **options, **plug_in(arm.memshare))
    follow(llm.llm_engine)
    # A request for each sample, and not one with n: vLLM returns what a request has cost, not what
    # each of its samples has.
    params = [
        SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed + k,
            extra_args=_ASK_USAGE,
        )
        for k in range(sampling.samples)
    ]
    prompts = json.loads(Path(argument["prompts"]).read_text())
    chats: Any = [[{"role": "user", "content": prompt}] for prompt in prompts for _ in params]
    outputs = llm.chat(chats, params * len(prompts), use_tqdm=False)
    answers = [
        ModelAnswer(
            output.outputs[0].text,
            len(output.outputs[0].token_ids),
            output.outputs[0].finish_reason == "length",
            _given_up(output.kv_transfer_params),
        )
        for output in outputs
    ]
    return _by_prompt(answers, sampling.samples)


def from_server(
    prompts: Sequence[str], sampling: Sampling, url: str, model: str, key: str, at_once: int,
    share: bool, on_progress: OnProgress,
) -> list[list[ModelAnswer]]:  # fmt: skip
    """Return ``samples`` answers to each prompt from an OpenAI-compatible server.

    Args:
        prompts: user turns.
        sampling: how answers are drawn.
        url: of the API, as ``http://127.0.0.1:8000/v1``.
        model: its name there.
        key: API key.
        at_once: requests under way at most.
        share: False asks MemShare to leave these requests exact (``vllm_xargs``).
        on_progress: is told of every answer.

    Raises:
        UserError: the server cannot be reached or refused a request.
    """
    return asyncio.run(_ask(prompts, sampling, url, model, key, at_once, share, on_progress))


async def _ask(
    prompts: Sequence[str], sampling: Sampling, url: str, model: str, key: str, at_once: int,
    share: bool, on_progress: OnProgress,
) -> list[list[ModelAnswer]]:  # fmt: skip
    from openai import AsyncOpenAI, OpenAIError

    gate = asyncio.Semaphore(at_once)
    count = len(prompts) * sampling.samples
    lengths: list[int] = []

    async def told(asked: Coroutine[Any, Any, ModelAnswer]) -> ModelAnswer:
        answer = await asked
        lengths.append(answer.tokens)
        written, ended = sum(lengths), len(lengths)
        total = written * count // ended  # the others are as long, as far as one can tell
        on_progress({"written": written, "total": total, "ended": ended, "requests": count})
        return answer

    async with AsyncOpenAI(base_url=url, api_key=key, timeout=None) as client:
        asked = [
            told(_ask_once(client, gate, prompt, sampling, model, sampling.seed + k, share))
            for prompt in prompts
            for k in range(sampling.samples)
        ]
        try:
            answers = await asyncio.gather(*asked)
        except OpenAIError as error:
            raise UserError(f"{url}: {error}") from None
    return _by_prompt(answers, sampling.samples)


async def _ask_once(
    client: AsyncOpenAI, gate: asyncio.Semaphore, prompt: str, sampling: Sampling, model: str,
    seed: int, share: bool,
) -> ModelAnswer:  # fmt: skip
    asked = _ASK_USAGE if share else _ASK_USAGE | {"memshare": "off"}
    async with gate:
        completion = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            max_completion_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            extra_body={"vllm_xargs": asked},
        )
    usage, choice = completion.usage, completion.choices[0]
    tokens = usage.completion_tokens if usage is not None else 0
    return ModelAnswer(
        choice.message.content or "",
        tokens,
        choice.finish_reason == "length",
        _given_up((completion.model_extra or {}).get("kv_transfer_params")),
    )


def _given_up(returned: Mapping[str, Any] | None) -> int:
    """Blocks that a request has given up, by what vLLM returned with it; plain vLLM, nothing."""
    return int((returned or {}).get("memshare", {}).get("blocks_shared", 0))


def _by_prompt(answers: Sequence[ModelAnswer], samples: int) -> list[list[ModelAnswer]]:
    return [list(answers[i : i + samples]) for i in range(0, len(answers), samples)]
