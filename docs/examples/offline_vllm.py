"""MemShare in vLLM's offline engine: eight requests, and KV memory for two thirds of them.

python docs/examples/offline_vllm.py
"""

from __future__ import annotations

import argparse
import os

TOPICS = (
    "a lighthouse",
    "a bakery",
    "a glacier",
    "a violin",
    "a harbour",
    "an owl",
    "a train",
    "tea",
)


def main() -> None:
    """Generate, and say what became of the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="or a folder, or a hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=600, help="of each story")
    parser.add_argument("--blocks", type=int, default=96, help="of KV memory, 32 tokens each")
    args = parser.parse_args()

    # vLLM reads these when it is imported. They matter on CPUs only.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vllm import LLM, SamplingParams
    from vllm.v1.metrics.reader import Counter

    from memshare.plug_in import plug_in
    from memshare.small_model.names import resolve_model

    llm = LLM(
        resolve_model(args.model),
        dtype=args.dtype,
        max_model_len=1024,
        block_size=32,
        num_gpu_blocks_override=args.blocks,
        enforce_eager=True,
        disable_log_stats=False,  # without them vLLM counts nothing
        **plug_in({"mode": "share", "policy": {"name": "twins"}}),
    )
    sampling = SamplingParams(max_tokens=args.tokens, temperature=0, ignore_eos=True)
    # One request stays exact: it gives up no block, and is nobody's donor.
    exact = SamplingParams(max_tokens=8, temperature=0, extra_args={"memshare": "off"})
    prompts = [f"A long story about {topic}, told twice over:" for topic in TOPICS]
    outputs = llm.generate(
        [*prompts, "The capital of France is"], [*[sampling] * len(prompts), exact], use_tqdm=False
    )
    for output in outputs:
        print(f"{output.prompt!r}: {output.outputs[0].text[:60]!r} ...")
    counters = [metric for metric in llm.get_metrics() if isinstance(metric, Counter)]
    for name in ("vllm:num_preemptions", "vllm:memshare_blocks_reclaimed"):
        print(f"{name} = {sum(counter.value for counter in counters if counter.name == name)}")


if __name__ == "__main__":
    main()
