"""Scorers by themselves, and as a worker part builds them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import run
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as torch calls it
from safetensors.torch import save_file
from torch import Tensor

from memshare.config import load_config, registry
from memshare.config.setup import EngineFacts, Setup
from memshare.kv.layout import RotaryTable
from memshare.kv.rotary import Rotation
from memshare.mechanisms.compaction.params import CompactionParams
from memshare.mechanisms.compaction.probe import find
from memshare.mechanisms.compaction.probe.card import ProbeCard
from memshare.mechanisms.compaction.probe.file import Probe, read_probe, write_probe
from memshare.mechanisms.compaction.probe.network import ProbeNetwork
from memshare.mechanisms.compaction.probe.turn import turn_of, upright
from memshare.mechanisms.compaction.probe.weights import fingerprint
from memshare.mechanisms.compaction.scorers import probe as probe_scorer
from memshare.mechanisms.compaction.scorers.probe import ProbeScorer
from memshare.mechanisms.compaction.scorers.recency import Recency
from memshare.mechanisms.compaction.scorers.refusals import scorer_refusals
from memshare.mechanisms.compaction.scorers.registry import (
    SCORERS,
    ScorerUnusable,
    build_scorer,
)
from memshare.mechanisms.contract import WorkerContext
from memshare.mechanisms.twins.params import TwinsParams

LAYERS, HEADS, TOKENS, CHANNELS, HIDDEN, NEIGHBOURS = 3, 4, 50, 16, 8, 2
POSITIONS = 512


@dataclass(frozen=True)
class Choice:
    scorer: str
    probe: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Layer:
    rotary: RotaryTable | None


def table(base: float = 1e4) -> Tensor:
    frequency = 1.0 / base ** (torch.arange(0, CHANNELS, 2) / CHANNELS)
    angles = torch.arange(POSITIONS)[:, None] * frequency
    return torch.cat((angles.cos(), angles.sin()), 1)


ROTATION = Rotation.from_cache(table(), neox=True)


def rotated(keys: Tensor, positions: Tensor) -> Tensor:
    """As a model rotates them, channel pair by channel pair."""
    cos, sin = ROTATION.cos[positions], ROTATION.sin[positions]
    x, y = keys.chunk(2, -1)
    return torch.cat((x * cos - y * sin, x * sin + y * cos), -1)


def tensors(together: int = 1, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    shapes = ProbeNetwork.names_and_shapes(LAYERS, HEADS, together, CHANNELS, HIDDEN)
    return {name: torch.rand(shape) - 0.3 for name, shape in shapes.items()}


def cached(seed: int = 1, first: int = 70) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upright keys, keys as cached, values, positions."""
    torch.manual_seed(seed)
    keys, values = torch.randn(2, LAYERS, HEADS, TOKENS, CHANNELS)
    positions = torch.arange(first, first + TOKENS, dtype=torch.int32)
    return keys, rotated(keys, positions.long()), values, positions


def context(model: str, rank: int = 0, ranks: int = 1, turn: Tensor | None = None) -> WorkerContext:
    layer = Layer(RotaryTable(table() if turn is None else turn, True, "RotaryEmbedding"))
    caches = {f"layer{i}": torch.zeros(2, HEADS // ranks, 4, 2 * CHANNELS) for i in range(LAYERS)}
    unused: Any = None
    return WorkerContext(
        config=unused, tables=unused, token_map=unused,
        layers=cast(Any, dict.fromkeys(caches, layer)), caches=caches,
        model=model, tensor_rank=rank, tensor_ranks=ranks,
    )  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with weights, and no more."""
    torch.manual_seed(2)
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {f"layers.{i}.weight": torch.randn(20, 30).bfloat16() for i in range(20)}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which probes are looked for."""
    folder = tmp_path / "probes"

    def folders() -> Iterator[Path]:
        yield folder

    monkeypatch.setattr(find, "folders", folders)
    return folder


def card(model: Path, **changes: Any) -> ProbeCard:
    facts = {
        "model": "tiny", "weights": fingerprint(str(model)), "layers": LAYERS, "heads": HEADS,
        "channels": CHANNELS, "together": (1,), "turn": turn_of(ROTATION), "neighbours": NEIGHBOURS,
        "hidden": HIDDEN, "target": "t", "trained_on": (), "made_by": "a test",
    }  # fmt: skip
    return ProbeCard.model_validate(facts | changes)


def write(path: Path, model: Path, **changes: Any) -> Path:
    written = card(model, **changes)
    named = {together: tensors(together) for together in written.together}
    write_probe(Probe(written, named), path)
    return path


# ---- what needs no model ----


def test_no_scorer_is_imported_before_it_is_named() -> None:
    code = (
        "import sys\nfrom memshare.mechanisms.compaction.scorers.registry import SCORERS\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    assert run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_every_scorer_scores_every_token_of_every_head(name: str, model: Path, kept: Path) -> None:
    write(kept / "tiny.safetensors", model)
    scorer = build_scorer(Choice(name), context(str(model)))
    _, keys, values, positions = cached()
    before = keys.clone(), values.clone()
    worth = scorer.score(keys, values, positions)
    assert worth.shape == (LAYERS, HEADS, TOKENS)
    assert worth.dtype == torch.float32
    assert torch.isfinite(worth).all()
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    assert torch.equal(worth, scorer.score(keys, values, positions))


@pytest.mark.parametrize(
    ("name", "together"), [("probe", 1), ("probe", 2), ("recency", 1), ("random", 1)]
)
def test_ranks_score_their_heads_as_one_rank_does(
    name: str, together: int, model: Path, kept: Path
) -> None:
    write(kept / "tiny.safetensors", model, together=(together,))
    _, keys, values, positions = cached()
    whole = build_scorer(Choice(name), context(str(model))).score(keys, values, positions)
    parts = [
        build_scorer(Choice(name), context(str(model), rank, 2)).score(
            keys[:, 2 * rank : 2 * rank + 2], values[:, 2 * rank : 2 * rank + 2], positions
        )
        for rank in range(2)
    ]
    # On a CPU with AMX matrices are rounded, the same for every head.
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize(("together", "ranks"), [(HEADS, 2), (HEADS, HEADS), (2, HEADS)])
def test_a_rank_with_a_part_of_a_group_takes_the_rest_for_average(
    together: int, ranks: int, model: Path, kept: Path
) -> None:
    path = write(kept / "tiny.safetensors", model, together=(together,))
    _, keys, values, positions = cached()
    heads = HEADS // ranks
    for rank in range(ranks):
        mine = slice(rank * heads, (rank + 1) * heads)
        scorer = build_scorer(Choice("probe"), context(str(model), rank, ranks))
        worth = scorer.score(keys[:, mine], values[:, mine], positions)
        # The definition: what is not there adds nothing to a normalised feature.
        named = read_probe(path).tensors[together]
        there = torch.zeros(2, together, 2 * CHANNELS, 1)
        there[:, torch.arange(rank * heads, (rank + 1) * heads) % together] = 1
        named["hidden.weight"] = named["hidden.weight"] * there.flatten(0, 2)
        network = ProbeNetwork(named, NEIGHBOURS)
        wanted = ProbeScorer(network, ROTATION, NEIGHBOURS).score(keys, values, positions)
        assert torch.allclose(worth, wanted[:, mine], atol=0.05)


def test_a_rank_uses_the_networks_that_read_the_most_of_its_heads(model: Path, kept: Path) -> None:
    path = write(kept / "tiny.safetensors", model, together=(HEADS, 2, 1))
    probe = read_probe(path)
    _, keys, values, positions = cached()
    for ranks, together in ((1, HEADS), (2, 2), (HEADS, 1)):
        heads = HEADS // ranks
        for rank in range(ranks):
            mine = slice(rank * heads, (rank + 1) * heads)
            scorer = build_scorer(Choice("probe"), context(str(model), rank, ranks))
            worth = scorer.score(keys[:, mine], values[:, mine], positions)
            network = probe.network(together)
            wanted = ProbeScorer(network, ROTATION, NEIGHBOURS).score(keys, values, positions)
            assert torch.allclose(worth, wanted[:, mine], atol=0.05)


def test_recency_follows_positions() -> None:
    _, keys, values, positions = cached()
    worth = build_scorer(Choice("recency"), context("x")).score(keys, values, positions)
    assert torch.equal(worth[1, 2], positions.float())


def test_random_knows_seed_layer_head_and_position_alone() -> None:
    _, keys, values, positions = cached()

    def draw(seed: int, first: int, count: int) -> Tensor:
        part = slice(first, first + count)
        scorer = build_scorer(Choice("random", seed=seed), context("x"))
        return scorer.score(keys[:, :, part], values[:, :, part] + 1.0, positions[part])

    whole = draw(3, 0, TOKENS)
    assert torch.equal(draw(3, 20, 10), whole[..., 20:30])
    assert not torch.equal(draw(4, 0, TOKENS), whole)
    rows = whole.flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == LAYERS * HEADS
    assert abs(float(rows.mean()) - 0.5) < 0.05
    # Neighbouring heads and positions have nothing in common.
    alike = torch.corrcoef(rows) - torch.eye(len(rows))
    assert alike.abs().max() < 0.6


# ---- the probe ----


def test_keys_lose_their_rotation() -> None:
    keys, turned, _, positions = cached(first=400)
    assert torch.allclose(upright(turned, positions, ROTATION), keys, atol=1e-5)


@pytest.mark.parametrize("smoothing", [1, 2])
def test_worth_is_averaged_over_neighbours(smoothing: int, model: Path, kept: Path) -> None:
    plain = ProbeNetwork(tensors(2), NEIGHBOURS)
    keys, turned, values, positions = cached()
    worth = plain.worth(keys, values)
    write(kept / "tiny.safetensors", model, together=(2,), smoothing=smoothing)
    found = build_scorer(Choice("probe"), context(str(model))).score(turned, values, positions)
    for i in range(TOKENS):
        mean = worth[..., max(i - smoothing, 0) : i + smoothing + 1].mean(-1)
        assert torch.allclose(found[..., i], mean, atol=0.05)
    assert not torch.allclose(found, worth, atol=0.05)


@pytest.mark.parametrize("together", [1, 2, HEADS])
def test_worth_is_what_the_features_give(together: int) -> None:
    """Against the definition: averages written down, normalised, a perceptron a group."""
    named = tensors(together)
    keys, turned, values, positions = cached()
    scorer = ProbeScorer(ProbeNetwork(named, NEIGHBOURS), ROTATION, NEIGHBOURS)
    worth = scorer.score(turned, values, positions)
    for layer in range(LAYERS):
        for group in range(HEADS // together):
            heads = range(group * together, (group + 1) * together)
            held = torch.cat([x for h in heads for x in (keys[layer, h], values[layer, h])], -1)
            around = torch.stack(
                [held[max(i - NEIGHBOURS, 0) : i + NEIGHBOURS + 1].mean(0) for i in range(TOKENS)]
            )
            at = {name: tensor[layer, group] for name, tensor in named.items()}
            features = (torch.cat((held, around), -1) - at["shift"]) * at["scale"]
            hidden = F.gelu(features @ at["hidden.weight"] + at["hidden.bias"])
            wanted = hidden @ at["out.weight"] + at["out.bias"]
            found = worth[layer, heads.start : heads.stop]
            assert torch.allclose(found, wanted.T, atol=1e-3)


def test_ranks_survive_the_rounding_of_fast_matrices() -> None:
    _, keys, values, positions = cached()
    network = ProbeNetwork(tensors(2), NEIGHBOURS)
    exact = ProbeScorer(network, ROTATION, NEIGHBOURS).score(keys, values, positions)
    part = network.part(0, HEADS, keys.device, torch.bfloat16)
    rounded = ProbeScorer(part, ROTATION, NEIGHBOURS).score(keys, values, positions)
    assert rounded.dtype == torch.float32
    for a, b in zip(exact.flatten(0, 1), rounded.flatten(0, 1), strict=True):
        ranks = torch.stack((a, b)).argsort(-1).argsort(-1).float()
        assert torch.corrcoef(ranks)[0, 1] > 0.999


def test_long_texts_are_scored_in_parts_with_their_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, keys, values, positions = cached()
    network = ProbeNetwork(tensors(2), NEIGHBOURS, smoothing=1)
    scorer = ProbeScorer(network, ROTATION, NEIGHBOURS + 1)
    whole = scorer.score(keys, values, positions)
    numbers = 2 * LAYERS * HEADS * CHANNELS
    monkeypatch.setattr(probe_scorer, "_NUMBERS_AT_ONCE", 7 * numbers)
    assert torch.allclose(scorer.score(keys, values, positions), whole, atol=1e-5)


def test_the_one_that_fits_is_found(
    model: Path, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        assert isinstance(build_scorer(Choice("probe"), context(str(model))), Recency)
    assert "memshare probe train" in caplog.text
    write(kept / "tiny.safetensors", model)
    for name in (None, "tiny", str(kept / "tiny.safetensors")):
        assert isinstance(build_scorer(Choice("probe", name), context(str(model))), ProbeScorer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": (1.0, 2.0)}, "weights: it was trained for tiny"),
        ({"turn": (1.0, 0.5)}, "turn: keys of layer0 rotate otherwise"),
    ],
)
def test_a_named_probe_that_does_not_fit_is_refused(
    change: dict[str, Any], words: str, model: Path, kept: Path
) -> None:
    write(kept / "tiny.safetensors", model, **change)
    with pytest.raises(ScorerUnusable, match=words):
        build_scorer(Choice("probe", "tiny"), context(str(model)))


def test_other_rope_parameters_than_in_training_are_refused(model: Path, kept: Path) -> None:
    write(kept / "tiny.safetensors", model)
    with pytest.raises(ScorerUnusable, match="rope parameters"):
        build_scorer(Choice("probe"), context(str(model), turn=table(base=2e4)))


def test_a_probe_that_is_not_there_is_refused(model: Path, kept: Path) -> None:
    with pytest.raises(ScorerUnusable, match="'tiny': there is no such file"):
        build_scorer(Choice("probe", "tiny"), context(str(model)))


# ---- before anything loads ----


def test_a_named_probe_is_checked_before_the_model_loads(model: Path, kept: Path) -> None:
    unused: Any = None
    setup = Setup(unused, EngineFacts(str(model), has_tokenizer=True))

    def found(choice: Choice, setup: Setup = setup) -> list[str]:
        return list(scorer_refusals(choice, setup))

    (missing,) = found(Choice("probe", "tiny"))
    assert missing.startswith("policy.probe = 'tiny': probe 'tiny': there is no such file")
    write(kept / "tiny.safetensors", model)
    assert found(Choice("probe", "tiny")) == found(Choice("probe")) == found(Choice("random")) == []
    (useless,) = found(Choice("random", "tiny"))
    assert "policy.scorer is 'random', which uses none" in useless
    write(kept / "tiny.safetensors", model, weights=(1.0, 2.0))
    (other,) = found(Choice("probe", "tiny"))
    assert "it was trained for tiny, and the weights of" in other
    assert "    fix: leave policy.probe out" in other
    # While only the options are known, the model is not.
    assert found(Choice("probe", "tiny"), Setup(unused)) == []


def test_cards_are_read_without_torch(model: Path, kept: Path) -> None:
    path = write(kept / "tiny.safetensors", model)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from memshare.mechanisms.compaction.probe.file import read_card\n"
        f"assert read_card(Path({str(path)!r})).model == 'tiny'\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    assert run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the policy `auto` ----


def test_auto_is_compaction_where_a_probe_fits_and_twins_where_not(model: Path, kept: Path) -> None:
    facts = EngineFacts(str(model), True, LAYERS, HEADS, CHANNELS)

    def choice(facts: EngineFacts | None = facts, **options: object) -> registry.Choice:
        return registry.settle(Setup(load_config(options, {}), facts))

    assert choice().params == TwinsParams(name="twins")
    train = f"compaction: no probe fits; `memshare probe train --model {model}` makes one"
    assert choice().reason == train
    write(kept / "tiny.safetensors", model)
    assert choice() == registry.Choice(CompactionParams(name="compaction"), f"it suits {model}")
    assert choice(policy={"name": "auto"}) == choice()
    # A probe is not all that it takes.
    for lacking, reason in (
        (None, "the engine is not known"),
        (replace(facts, heads=HEADS // 2), "no probe fits"),
        (replace(facts, changed="adapters"), "adapters"),
        (replace(facts, view_refusal="ALiBi"), "ALiBi"),
    ):
        assert choice(lacking).params.name == "twins"
        assert choice(lacking).reason.startswith(f"compaction: {reason}")
    assert choice(mode="observe").reason == "compaction: it observes nothing"
    # What is named, runs, and nothing is said about it.
    for name in ("compaction", "twins", "oldest"):
        assert choice(policy={"name": name}).params.name == name
        assert choice(policy={"name": name}).reason == ""
