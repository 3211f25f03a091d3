"""Policies of the field on one table (memshare/lab/retention)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memshare.cli.main import main
from memshare.errors import UserError
from memshare.lab.cache_reading import CacheReading
from memshare.lab.probe.evaluate import Dropping
from memshare.lab.probe.reader import CacheReader
from memshare.lab.probe.texts import Text
from memshare.lab.retention.attention import AttentionUse
from memshare.lab.retention.needles import answer_tokens, needles
from memshare.lab.retention.policies import POLICIES, Watched, judge_policy, kept_by_shares
from memshare.mechanisms.compaction.scorers.random import RandomScorer
from memshare.mechanisms.compaction.scorers.recency import Recency
from tests.memshare.engine.harness import write_tiny_model

PREFIX, REST, PROMPT, WINDOW = 600, 24, 20, 16
WORDS = "".join(f"Line {i}: the sum of {i} and {i * i} is {i + i * i}.\n" for i in range(40))


@pytest.fixture(scope="module")
def text(reader: CacheReader) -> Text:
    ids = reader.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    return Text("sums", tuple(ids), PROMPT, "sums")


@pytest.fixture(scope="module")
def seen(reader: CacheReader, text: Text) -> Watched:
    use = AttentionUse(PREFIX, WINDOW)
    reader.read_watched(text, PREFIX, use)
    scorers = {"recency": Recency(), "random": RandomScorer(0, 0)}
    return Watched(reader.read(text, PREFIX, REST), use, scorers)


def test_attention_is_the_models_own(reader: CacheReader, text: Text, seen: Watched) -> None:
    """Read in parts, against attention of the whole text that is written down."""
    queries: dict[int, torch.Tensor] = {}
    keys: dict[int, torch.Tensor] = {}

    def watch(layer: int, new: torch.Tensor, cached: torch.Tensor, values: torch.Tensor) -> None:
        known = queries.get(layer)
        queries[layer] = new if known is None else torch.cat((known, new), 1)
        keys[layer] = cached

    reader.read_watched(text, PREFIX, watch)
    positions = torch.arange(PREFIX)
    later = positions > positions[:, None]
    for layer, all_queries in queries.items():
        heads, channels = len(keys[layer]), keys[layer].shape[-1]
        group = len(all_queries) // heads
        scores = all_queries @ keys[layer].repeat_interleave(group, 0).mT / channels**0.5
        attention = scores.masked_fill(later, -torch.inf).softmax(-1)
        used = attention > 1 / (positions[:, None] + 1)
        last = ((positions[:, None] + 1) * used).amax(1).float()
        expected = {
            "total": attention.sum(1).view(heads, group, -1).mean(1),
            "window": attention[:, -WINDOW:].sum(1).view(heads, group, -1).mean(1),
            "uses": used.float().sum(1).view(heads, group, -1).mean(1),
            "last_use": last.view(heads, group, -1).amax(1),
        }
        for name, wanted in expected.items():
            found = getattr(seen.use, name)[layer]
            # Rounding decides about a use now and then.
            assert ((found - wanted).abs() < 1e-3 * (1 + wanted)).float().mean() > 0.995, name


def test_what_is_hidden_is_as_good_as_gone(reader: CacheReader, seen: Watched) -> None:
    reading = seen.reading
    hidden = torch.zeros(reading.keys.shape[:3], dtype=torch.bool)
    exact = reader.judge(reading, reading.keys, reading.values, hidden)
    assert abs(exact[:, 0]).max() < 1e-5
    hidden[:, :, 100:300] = True
    stays = [*range(100), *range(300, PREFIX)]
    gone = reader.judge(reading, reading.keys[:, :, stays], reading.values[:, :, stays])
    masked = reader.judge(reading, reading.keys, reading.values, hidden)
    assert masked == pytest.approx(gone, abs=1e-4)
    assert gone[:, 0].mean() > 1e-3


CACHE_ALONE = [n for n, p in POLICIES.items() if not n.startswith("probe") and not p.routed]


@pytest.mark.parametrize("name", CACHE_ALONE)
def test_every_policy_drops_the_same_bytes(name: str, reader: CacheReader, seen: Watched) -> None:
    policy = POLICIES[name]
    nothing = judge_policy(reader, seen, policy, 0.0, 32, 0.7)
    half = judge_policy(reader, seen, policy, 0.5, 32, 0.7)
    assert nothing[:, 0].abs().max() < 1e-4
    assert half[:, 0].mean() > 1e-3
    assert policy.needs(reader, PREFIX, WINDOW) >= 0


def test_routers_say_what_a_token_is_worth(tmp_path: Path, text: Text, seen: Watched) -> None:
    """Of a mixture of random experts, and of a router that is sure of one token alone."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=258, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, intermediate_size=64, max_position_embeddings=1024,
        initializer_range=0.2,
    )  # fmt: skip
    write_tiny_model(tmp_path)  # for its tokenizer
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    reader = CacheReader(str(tmp_path))
    logits, chosen = reader.read_routers(text, PREFIX)
    assert (logits.shape, chosen) == ((2, PREFIX, 8), 2)
    use = AttentionUse(PREFIX, WINDOW)
    reader.read_watched(text, PREFIX, use)
    mixed = Watched(reader.read(text, PREFIX, REST), use, {}, (logits, chosen))
    for name in ("router entropy", "rare experts"):
        worth = POLICIES[name].worth(mixed)
        assert worth.shape == (2, 2, PREFIX)
        assert judge_policy(reader, mixed, POLICIES[name], 0.5, 32, 0.0)[:, 0].mean() > 1e-4

    told = torch.zeros(2, PREFIX, 8)
    told[:, :, 0] = 1.0  # everybody goes to the first two experts, undecided,
    told[:, :, 1] = 0.9
    told[:, 7, 5] = 9.0  # but one
    lone = Watched(seen.reading, seen.use, {}, (told, 2))
    assert (POLICIES["router entropy"].worth(lone).argmin(-1) == 7).all()
    assert (POLICIES["rare experts"].worth(lone).argmax(-1) == 7).all()


def test_a_dense_model_has_no_routers(reader: CacheReader, text: Text) -> None:
    with pytest.raises(UserError, match="is no mixture of experts"):
        reader.read_routers(text, PREFIX)


def reading_of(prompt: int, prefix: int, heads: int) -> CacheReading:
    """One that nobody has read: its lengths alone are looked at."""
    nothing = torch.empty(0)
    keys = torch.zeros(1, heads, prefix, 4)
    return CacheReading(torch.zeros(prefix).long(), prompt, prefix, keys, keys, nothing)


def test_heads_share_by_worth_and_keep_a_part_of_their_own() -> None:
    reading = reading_of(prompt=10, prefix=210, heads=3)
    worth = torch.rand(2, 3, 210, generator=torch.Generator().manual_seed(0))
    worth[0, 1] *= 100  # of one layer a single head matters
    kept = kept_by_shares(reading, worth, Dropping(0.5, recent=0, position_weight=0.0))
    assert kept[:, :, :10].all()
    shares = kept[:, :, 10:].sum(-1)
    assert (shares.sum(-1) == 3 * (200 - 105)).all(), "in every layer as much as without shares"
    assert shares.min() >= int(0.2 * 95)
    assert shares[0, 1] > shares[1, 1] + 50


def test_a_needle_is_hidden_once_and_asked_for(reader: CacheReader) -> None:
    one, other = needles(reader.tokenizer, 2, 900)
    count = answer_tokens(reader.tokenizer, one)
    key = str(reader.tokenizer.decode(one.tokens[-count:])).strip()
    body = str(reader.tokenizer.decode(one.tokens[one.prompt : 900]))
    assert key.isdecimal()
    assert len(key) == 5
    assert body.count(f"The pass key is {key}. Remember it: {key} is the pass key.") == 1
    assert one.tokens != other.tokens
    assert one.cut == other.cut == 900


def test_the_command_prints_one_table_and_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "sums.txt").write_text(WORDS)
    work = tmp_path / "work.jsonl"
    words = ["probe", "compare", "--model", str(model), "--prefix", "400", "--continuation", "20"]
    words += ["--texts", str(folder), "--work", str(work), "--needles", "2"]
    first = [*words, "--policies", "recency;window, shares", "--freed", "0.4"]
    assert main(first) == 0
    assert "| recency | StreamingLLM | 0." in capsys.readouterr().out
    lines = work.read_text().splitlines()
    assert len(lines) == 3, "settings, two policies; a model of chance finds no needle"
    assert main([*words, "--policies", "recency;uses", "--freed", "0.4,0.5"]) == 0
    table = capsys.readouterr().out
    assert work.read_text().splitlines()[:3] == lines, "what was measured stays"
    assert len(work.read_text().splitlines()) == 6
    for row in ("| recency |", "| window, shares |", "| uses |"):
        assert row in table
    assert main([*first, "--recent", "64"]) == 1
    assert "it was measured with other settings" in capsys.readouterr().err
    assert main([*words, "--policies", "newest"]) == 1
    assert "--policies newest: choose of recency; random" in capsys.readouterr().err
