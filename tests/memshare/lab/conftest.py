"""A tiny Llama with random weights, of byte tokens, and what reads texts with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memshare.lab.probe.reader import CacheReader
from tests.memshare.engine.harness import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    torch.manual_seed(0)
    # Weights as large as a trained model's, or attention would look at everything alike.
    config = AutoConfig.from_pretrained(folder, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(model: Path) -> CacheReader:
    return CacheReader(str(model))
