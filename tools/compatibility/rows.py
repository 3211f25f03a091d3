"""The rows of the tables. None says how well it is tested: tests that ran do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

State = Literal["tested", "by parts", "refused", "not run"]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        key: the name by which tests claim it: ``@pytest.mark.proves(KEY)``.
        cells: its first cells.
        note: what follows the state in the last cell, from its first comma, colon or space on.
        when: the state that the note is about; beside another one it is left out.
    """

    key: str
    cells: tuple[str, ...]
    note: str = ""
    when: State = "tested"


@dataclass(frozen=True)
class Table:
    """One table: the titles of its columns, the last of which is the state; and its rows."""

    titles: tuple[str, ...]
    rows: tuple[Row, ...]


TABLES: Mapping[str, Table] = {
    "hardware": Table(
        ("what", "state"),
        (
            Row("x86", ("x86 CPUs with AVX-512, vLLM's CPU build",)),
            Row("arm", ("Arm and other CPUs",)),
            Row("nvidia", ("NVIDIA GPUs",)),
            Row("accelerators", ("other accelerators",)),
            Row("runner v1", ("model runner V1",)),
            Row("runner v2", ("model runner V2, the default on GPUs",)),
            Row("cuda graphs", ("CUDA graphs",)),
            Row("async scheduling", ("asynchronous scheduling, on by default on GPUs",)),
            Row("prefix caching", ("prefix caching, chunked prefill",)),
            Row("compaction eager", ("`compaction` on the CPU backend, eager",)),
            Row("compaction compiled", ("`compaction` on the CPU backend, compiled",)),
            Row("compaction bfloat16", ("`compaction` in bfloat16",)),
            Row("compaction fp8", ("`compaction` with fp8, scales other than 1",)),
            Row("compaction ranks", ("`compaction` with tensor parallelism",), ", with 2 ranks"),
            Row(
                "compaction backends",
                ("`compaction` on FLASH_ATTN, TRITON_ATTN, FLEX_ATTENTION, ROCM_ATTN",),
                ": their metadata builders are given tables without holes",
                "by parts",
            ),
            Row("compaction flashinfer", ("`compaction` on FLASHINFER",)),
            Row(
                "compaction graphs",
                ("`compaction` with full CUDA graphs, and its Triton kernel",),
                ": addresses stay the same; the kernel runs in Triton's interpreter and compiles "
                "for sm_80, sm_90 and gfx942",
                "by parts",
            ),
        ),
    ),
    "models": Table(
        ("attention", "examples", "state"),
        (
            Row(
                "full attention",
                (
                    "full attention, RoPE, grouped heads",
                    "Llama, Qwen2, Qwen3, their R1 distillations",
                ),
                " with the architectures of Llama, Mistral, Qwen 2 and Qwen 3",
            ),
            Row(
                "hybrid sliding",
                (
                    "[hybrid](hybrids.md): sliding windows and full attention",
                    "gpt-oss, Gemma 3",
                ),
                " with small models of these architectures, in float32 and on one rank",
            ),
            Row(
                "hybrid linear",
                (
                    "hybrid: linear attention (gated delta nets) and full attention",
                    "Qwen3-Next",
                ),
                " with a small model, in bfloat16",
            ),
            Row(
                "hybrid mamba",
                ("Mamba, alone or beside full attention", "Nemotron-H, Bamba, Jamba"),
            ),
            Row(
                "hybrid others",
                (
                    "hybrid with several groups of full attention, or chunked attention",
                    "Llama 4",
                ),
            ),
            Row("sliding window", ("sliding windows everywhere", "early Mistral")),
            Row("mla", ("multi-head latent attention (MLA)", "DeepSeek-V3, R1 itself")),
            Row("encoder-decoder", ("encoder-decoder", "")),
            Row("pooling", ("pooling", "")),
        ),
    ),
    "options": Table(
        ("option", "state"),
        (
            Row(
                "tensor parallel",
                ("`tensor_parallel_size` up to the model's heads",),
                " with 2 on CPUs",
            ),
            Row("pipeline parallel", ("`pipeline_parallel_size` above 1",)),
            Row(
                "context parallel",
                ("`decode_context_parallel_size`, `prefill_context_parallel_size` above 1",),
            ),
            Row("cache auto", ("`kv_cache_dtype` `auto`, `float16`, `bfloat16`",), " (`auto`)"),
            Row(
                "cache fp8",
                ("`kv_cache_dtype` `fp8`, `fp8_e4m3`, `fp8_e5m2`",),
                ": `fp8` on CPUs; `fp8_e4m3` and `fp8_e5m2` not run",
            ),
            Row("cache others", ("other `kv_cache_dtype`",)),
            Row(
                "ngram",
                ("`speculative_config` with method `ngram`",),
                " with `compaction`; with other policies not run",
            ),
            Row(
                "drafts",
                ("with `eagle` or `draft_model`",),
                " with `compaction`, and with remaps that stage two finds",
            ),
            Row("eagle3", ("with `eagle3` or `mtp`",), "; as `eagle`", "not run"),
            Row("other drafts", ("with another method",)),
            Row(
                "offloading",
                ("vLLM's offloading connector, for prompts (`kv_offloading_size`)",),
                " with its real scheduler and copies by a CPU ([other connectors]"
                "(other-connectors.md))",
            ),
            Row("lmcache", ("LMCache in the engine's process, Nixl on the decode side",)),
            Row("other connector", ("any other KV connector",)),
            Row("other worker", ("another `worker_cls`",)),
            Row("no tokenizer", ("`skip_tokenizer_init` with `twins` or `paper`",)),
            Row(
                "lora",
                ("LoRA adapters, each with a cache of its own",),
                " with `compaction` on CPUs; else by parts",
            ),
            Row(
                "lora shared",
                ("LoRA adapters that share one cache (`agents.scheme`)",),
                " on CPUs, with `mode: off` and up to 2 ranks or 2 replicas; "
                "[what is refused](agents.md#what-is-refused)",
            ),
            Row("executor mp", ("executor `mp`",)),
            Row("executor ray", ("executor `ray`",), ": vLLM has none for CPUs", "not run"),
        ),
    ),
    "requests": Table(
        ("request", "state"),
        (
            Row("interfaces", ("chat, completions, responses, messages; streamed or whole",)),
            Row("sampling", ("temperature, seeds",)),
            Row("exact requests", ("log-probabilities of the prompt",), ": served exactly"),
        ),
    ),
}  # fmt: skip

OTHER_VERSIONS: Mapping[str, str] = {
    "vLLM": "refused",
    "Python": "3.12 to 3.14: not run; 3.15: refused by vLLM",
    "Ray": "pinned; not needed with plain vLLM",
    "PyTorch": "pinned",
}
"""What is to be said of other versions than those of the last run."""

NOT_INSTALLED: Mapping[str, tuple[str, str]] = {
    "KubeRay": ("1.7", "manifests are checked against its schema; not run"),
    "operating system": ("Linux", "refused by vLLM's CPU build or not run"),
}
"""What tests run on, or against the schema of."""

ROWS: Mapping[str, Row] = {row.key: row for table in TABLES.values() for row in table.rows}
