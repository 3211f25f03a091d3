"""Probes on disk, and how the model is recognised that they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from memshare.mechanisms.compaction.probe.card import ProbeCard
from memshare.mechanisms.compaction.probe.file import (
    Probe,
    ProbeUnusable,
    read_card,
    read_probe,
    write_probe,
)
from memshare.mechanisms.compaction.probe.find import ServedModel, misfits
from memshare.mechanisms.compaction.probe.network import ProbeNetwork
from memshare.mechanisms.compaction.probe.weights import fingerprint, same_weights

LAYERS, HEADS, CHANNELS, HIDDEN = 2, 4, 8, 5


def card(**changes: Any) -> ProbeCard:
    facts = {
        "model": "tiny", "weights": (0.5, -0.25), "layers": LAYERS, "heads": HEADS,
        "channels": CHANNELS, "together": (2, 1), "turn": (1.0, 0.1, 0.01, 0.001),
        "neighbours": 2, "hidden": HIDDEN,
        "target": "largest attention", "trained_on": (), "made_by": "a test",
        "rank_correlation": {2: 0.5, 1: 0.4},
        "judged": [
            {"kind": "chains of thought", "texts": 3, "prefix": 100, "freed": 0.4,
             "tensor_parallel_size": 2,
             "kl": 0.01, "same_top": 0.97, "unchanged": 1},
        ],
    }  # fmt: skip
    return ProbeCard.model_validate(facts | changes)


def tensors() -> dict[int, dict[str, torch.Tensor]]:
    return {
        together: {
            name: torch.rand(shape).half()
            for name, shape in ProbeNetwork.names_and_shapes(
                LAYERS, HEADS, together, CHANNELS, HIDDEN
            ).items()
        }
        for together in (2, 1)
    }


def test_a_file_holds_the_probe_and_lies_beside_its_card(tmp_path: Path) -> None:
    probe = Probe(card(), tensors())
    path = tmp_path / "new" / "tiny.safetensors"
    write_probe(probe, path)
    again = read_probe(path)
    assert again.card == probe.card
    for together, named in probe.tensors.items():
        assert again.tensors[together].keys() == named.keys()
        assert all(torch.equal(again.tensors[together][name], t) for name, t in named.items())
    assert sorted(file.name for file in path.parent.iterdir()) == ["tiny.md", "tiny.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644
    text = path.with_suffix(".md").read_text()
    assert "| 3 chains of thought | 100 | 40% | yes | 128 | 2 | 0.0100 | 0.970 | 1 |" in text


def test_tensors_of_other_shapes_than_the_card_says_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    write_probe(Probe(card(hidden=HIDDEN + 1), tensors()), path)
    with pytest.raises(ProbeUnusable, match=r"2\.hidden\.weight: shape .* `memshare probe train"):
        read_probe(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "has no 'memshare_probe'"),
        ("not JSON", "memshare_probe: Invalid JSON"),
        ('{"format": 1, "together": 2}', "format: 1, and this version reads 2"),
        (json.dumps({"layers": 0}), "model: Field required"),
        (json.dumps(card().model_dump() | {"together": [3]}), "heads: 4 do not make groups"),
        (json.dumps(card().model_dump() | {"together": [1, 2]}), r"together: \(1, 2\) must fall"),
        (json.dumps(card().model_dump() | {"more": 1}), "more: Extra inputs"),
    ],
)
def test_what_is_no_probe_is_refused(metadata: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors()[1], path, metadata=metadata and {"memshare_probe": metadata})
    with pytest.raises(ProbeUnusable, match=words):
        read_card(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_broken_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProbeUnusable, match=r"x\.safetensors.*memshare probe train"):
        read_card(path)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (ServedModel("m", LAYERS + 1, HEADS, CHANNELS), "layers"),
        (ServedModel("m", LAYERS, HEADS, 2 * CHANNELS), "channels"),
        (ServedModel("m", LAYERS, HEADS, CHANNELS, ranks=2), "heads"),
        (ServedModel("m", LAYERS, 1, CHANNELS, ranks=6), "heads"),
    ],
)
def test_other_shapes_do_not_fit(model: ServedModel, field: str) -> None:
    (found,) = misfits(card(), model, None)
    assert found.startswith(f"{field}: it is for")
    assert "memshare probe train --model m" in found


@pytest.mark.parametrize(
    ("heads", "ranks", "firsts"),
    [(4, 1, [0]), (2, 2, [0, 2]), (1, 4, [0, 1, 2, 3]), (1, 8, [0, 0, 1, 1, 2, 2, 3, 3])],
)
def test_heads_are_spread_over_ranks_as_vllm_does_it(
    heads: int, ranks: int, firsts: list[int]
) -> None:
    model = ServedModel("m", LAYERS, heads, CHANNELS, ranks)
    assert [model.first_head(rank, HEADS) for rank in range(ranks)] == firsts
    assert not list(misfits(card(), model, (0.5, -0.25)))
    assert card().group(heads) == min(heads, 2)


def test_a_rank_has_whole_groups_of_heads_or_a_part_of_one() -> None:
    twelve = card(heads=12, together=[12, 4])
    assert [twelve.group(heads) for heads in (12, 4, 3, 2, 1)] == [12, 4, 12, 4, 4]
    assert twelve.tensor_parallel_sizes == (1, 2, 3, 4, 6, 12)
    model = ServedModel("m", LAYERS, 6, CHANNELS, ranks=2)
    assert not list(misfits(twelve, model, None))
    (found,) = misfits(card(heads=12, together=[4]), model, None)
    assert found.startswith("together: it reads 4 heads together, and a rank has 6; serve with a")
    assert "tensor-parallel size of 1, 3, 6, 12," in found
    assert "--heads-together 1" in found


# ---- weights ----


def write_model(folder: Path, dtype: torch.dtype, change: float = 1.0, shards: int = 1) -> str:
    torch.manual_seed(0)
    folder.mkdir()
    names = [f"layers.{i}.proj.weight" for i in range(24)]
    weights = {name: (torch.randn(30, 20) * change).to(dtype) for name in names}
    weights["norm.weight"] = torch.ones(20, dtype=dtype)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return str(folder)
    where = {}
    for shard in range(shards):
        part = {name: t for i, (name, t) in enumerate(weights.items()) if i % shards == shard}
        save_file(part, folder / f"model-{shard}.safetensors")
        where |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return str(folder)


def test_the_same_weights_are_recognised_however_they_are_stored(tmp_path: Path) -> None:
    exact = fingerprint(write_model(tmp_path / "a", torch.float32))
    assert exact is not None
    for i, (dtype, shards) in enumerate(
        [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 3)]
    ):
        other = fingerprint(write_model(tmp_path / f"b{i}", dtype, shards=shards))
        assert other is not None
        assert same_weights(exact, other)


def test_trained_weights_are_others(tmp_path: Path) -> None:
    one = fingerprint(write_model(tmp_path / "a", torch.bfloat16))
    other = fingerprint(write_model(tmp_path / "b", torch.bfloat16, change=1.1))
    assert one is not None
    assert other is not None
    assert not same_weights(one, other)
    assert not same_weights(one, one[:-1])


def test_no_weights_no_fingerprint(tmp_path: Path) -> None:
    assert fingerprint(str(tmp_path)) is None
    assert fingerprint(write_model(tmp_path / "a", torch.int8)) is None
