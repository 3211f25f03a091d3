"""A real vLLM engine in this process, and a model that needs no weights."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from memshare.plug_in import plug_in
from tests.machine import DTYPE

BLOCK = 32

StartEngine = Callable[..., AbstractContextManager["Engine"]]


class Engine:
    """A vLLM engine, with or without MemShare."""

    def __init__(self, model: str, memshare: dict[str, Any] | None, **options: Any) -> None:
        from vllm import LLM

        settings = {
            "max_model_len": 2048,
            "block_size": BLOCK,
            "enforce_eager": True,
            "seed": 0,
            "dtype": DTYPE,
            "disable_log_stats": False,
        }
        self.llm = LLM(model, **settings | plug_in(memshare) | options)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def side(self) -> Any:
        return self.scheduler.connector.scheduler_side

    @property
    def worker_side(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker_side

    @property
    def totals(self) -> Counter[str]:
        return Counter(self.side.recorder.counters.totals)

    def metric(self, name: str) -> float:
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)

    def generate(
        self, prompts: list[str], max_tokens: int, extra_args: dict[str, Any] | None = None
    ) -> list[tuple[int, ...]]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, extra_args=extra_args
        )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def is_clean(self) -> bool:
        """All requests are done: free = total, and the prefix cache can be reset."""
        pool = self.scheduler.kv_cache_manager.block_pool
        all_free = pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        return all_free and self.scheduler.reset_prefix_cache()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def forget_numba() -> None:
    """Let another engine start in this process after one with n-gram drafts.

    vLLM looks through all modules when it starts, and cannot look into those that n-gram brings
    (vllm/triton_utils/dispatcher.py).
    """
    for name in [name for name in sys.modules if name.startswith("llvmlite")]:
        del sys.modules[name]


def write_tiny_weights(folder: Path, seed: int = 0) -> Path:
    """Give a model of :func:`write_tiny_model` random weights whose outputs mean something.

    Weights that ``load_format="dummy"`` makes are so small that all logits are nearly equal: tokens
    hardly depend on the KV cache, and a wrong block would go unseen. These have the scale at which
    attention is sharp, and weighs as much as the token itself.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    vocabulary, head = config["vocab_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    generator = torch.Generator().manual_seed(seed)

    def weights(rows: int, columns: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    tensors = {
        "model.embed_tokens.weight": weights(vocabulary, hidden, hidden**0.5),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": weights(vocabulary, hidden, 3.0),
    }
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        parts = {"q_proj": (queries, 2.0), "k_proj": (keys, 2.0), "v_proj": (keys, 1.5)}
        for part, (rows, gain) in parts.items():
            tensors[f"{name}.self_attn.{part}.weight"] = weights(rows, hidden, gain)
        tensors[f"{name}.self_attn.o_proj.weight"] = weights(hidden, queries, 1.5)
        for part in ("gate_proj", "up_proj"):
            tensors[f"{name}.mlp.{part}.weight"] = weights(inner, hidden, 1.0)
        tensors[f"{name}.mlp.down_proj.weight"] = weights(hidden, inner, 1.0)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{part}.weight"] = torch.ones(hidden)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inspect_models_here(patch: pytest.MonkeyPatch) -> None:
    """Let vLLM look at a model's class in this process.

    For each class that a machine has not seen it starts a process, which imports vllm, so that CUDA
    is not initialised in this one.
    """
    from vllm.model_executor.models import registry

    patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())


def write_tiny_model(folder: Path, **changes: Any) -> Path:
    """Write a model's configuration and a tokenizer of bytes.

    Args:
        folder: is there.
        changes: of the configuration.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: token for token, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 258, "bos_token_id": 256,
        "eos_token_id": 257, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
