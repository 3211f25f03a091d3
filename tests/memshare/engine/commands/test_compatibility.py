"""What is refused is what the compatibility page says: over set-ups, the check and the engine agree
with its tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memshare.engine.commands.test_check import look, other_process
from tests.memshare.engine.test_refusals import change, vllm_config
from tools.compatibility.claims import claims
from tools.compatibility.page import states
from tools.compatibility.record import read

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

__all__ = ["other_process", "vllm_config"]  # fixtures

STATES = states(read(), claims())

Spoil = Callable[[Any], None]

SETTINGS: Mapping[str, tuple[Spoil, ...]] = {
    "pipeline parallel": (change("parallel_config.pipeline_parallel_size", 2),),
    "context parallel": (
        change("parallel_config.decode_context_parallel_size", 2),
        change("parallel_config.prefill_context_parallel_size", 2),
    ),
    "tensor parallel": (change("parallel_config.tensor_parallel_size", 2),),
    "cache auto": tuple(
        change("cache_config.cache_dtype", name) for name in ("auto", "float16", "bfloat16")
    ),
    "cache fp8": tuple(
        change("cache_config.cache_dtype", name) for name in ("fp8", "fp8_e4m3", "fp8_e5m2")
    ),
    "cache others": tuple(
        change("cache_config.cache_dtype", name) for name in ("turboquant", "nvfp4", "fp8_inc")
    ),
    "ngram": (change("speculative_config", SimpleNamespace(method="ngram")),),
    "other drafts": tuple(
        change("speculative_config", SimpleNamespace(method=name))
        for name in ("medusa", "mlp_speculator", "suffix")
    ),
    "other connector": tuple(
        change("kv_transfer_config.kv_connector", name)
        for name in ("LMCacheConnectorV1", "OffloadingConnector", "NixlConnector", "MultiConnector")
    ),
    "other worker": (change("parallel_config.worker_cls", "another.Worker"),),
    "no tokenizer": (change("model_config.skip_tokenizer_init", True),),
    "encoder-decoder": (change("model_config.is_encoder_decoder", True),),
    "pooling": (change("model_config.runner_type", "pooling"),),
}
PROVED_HERE = ("encoder-decoder", "pooling")
# Settings of one option, of which a set-up has one.
ALIKE = (
    ("cache auto", "cache fp8", "cache others"),
    ("ngram", "other drafts"),
)

SETUPS = st.fixed_dictionaries(
    {}, optional={row: st.sampled_from(spoils) for row, spoils in SETTINGS.items()}
).map(lambda drawn: {row: s for row, s in drawn.items() if not _is_overruled(row, drawn)})


def _is_overruled(row: str, drawn: Mapping[str, Spoil]) -> bool:
    """Whether a later row of the same option is drawn as well."""
    for rows in ALIKE:
        if row in rows:
            return any(other in drawn for other in rows[rows.index(row) + 1 :])
    return False


def is_refused(config: Any) -> bool:
    from memshare.engine.compatibility import UnsupportedSetup, check_before_load

    try:
        check_before_load(config)
    except UnsupportedSetup:
        return True
    return False


def test_an_engine_refuses_what_the_page_says(vllm_config: Any) -> None:
    @settings(max_examples=60)
    @given(setup=SETUPS)  # within: hypothesis could not print vLLM's configuration
    def agrees(setup: dict[str, Spoil]) -> None:
        config = copy.deepcopy(vllm_config)
        for spoil in setup.values():
            spoil(config)
        assert is_refused(config) == any(STATES[row] == "refused" for row in setup), sorted(setup)

    agrees()


@pytest.mark.proves("encoder-decoder", how="refused", case="encoder-decoder")
@pytest.mark.proves("pooling", how="refused", case="pooling")
@pytest.mark.parametrize("row", SETTINGS)
def test_each_setting_alone(vllm_config: Any, row: str) -> None:
    for spoil in SETTINGS[row]:
        config = copy.deepcopy(vllm_config)
        spoil(config)
        # What is proved here is not taken from the page, or it could never get there.
        wanted = row in PROVED_HERE or STATES[row] == "refused"
        assert is_refused(config) == wanted


# As users write them; of these vLLM itself accepts every combination.
WORDS: Mapping[str, tuple[str, ...]] = {
    "pipeline parallel": ("--pipeline-parallel-size=2",),
    "tensor parallel": ("--tensor-parallel-size=2",),
    "no tokenizer": ("--skip-tokenizer-init",),
    "other connector": (
        "--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}',
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def check(other_process: ProcessPoolExecutor, tiny: str) -> Callable[..., list[str]]:
    """What the check finds wrong with vLLM's options."""

    def faults(*rows: str) -> list[str]:
        words = ("--block-size=32", *(word for row in rows for word in WORDS[row]))
        found, _ = other_process.submit(look, tiny, words).result()
        return [finding.text for finding in found if finding.level == "fail"]

    return faults


@pytest.mark.parametrize("rows", [(), *((row,) for row in WORDS), tuple(WORDS)], ids=", ".join)
def test_the_check_refuses_what_the_page_says(
    check: Callable[..., list[str]], rows: tuple[str, ...]
) -> None:
    refused = any(STATES[row] == "refused" for row in rows)
    assert bool(check(*rows)) == refused
