"""Training and judging probes: a tiny Llama with random weights, of byte tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memshare.cli.main import main
from memshare.lab.probe.collect import Samples
from memshare.lab.probe.evaluate import Dropping, drop_in_rounds, drop_once, judge
from memshare.lab.probe.fit import Fit, fit
from memshare.lab.probe.reader import CacheReader, LargestAttention
from memshare.lab.probe.texts import Text, folds, recorded_texts, solutions
from memshare.mechanisms.compaction.probe.file import read_probe
from memshare.mechanisms.compaction.probe.find import ServedModel, find_probe
from memshare.mechanisms.compaction.scorers.random import RandomScorer
from memshare.mechanisms.compaction.scorers.recency import Recency
from memshare.small_model.head_padding import pad_heads

PREFIX, REST, PROMPT = 320, 24, 20
LAYERS, HEADS, CHANNELS = 2, 2, 32
WORDS = "".join(f"Line {i}: the sum of {i} and {i * i} is {i + i * i}.\n" for i in range(40))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        record = {"problem": f"Problem {i}: add the numbers.", "reasoning": WORDS[13 * i :]}
        (folder / f"{i}.json").write_text(json.dumps(record))
    return folder


def text(reader: CacheReader, start: int = 0) -> Text:
    ids = reader.tokenizer(WORDS[start:], add_special_tokens=False)["input_ids"]
    return Text(f"text{start}", tuple(ids), PROMPT, "sums")


# ---- the reader ----


def test_upright_keys_do_not_know_their_position(reader: CacheReader) -> None:
    token = Text("same", (65,) * 300, 0, "x")
    keys = reader.upright(reader.read(token, 300).keys)
    # The first layer's key of a token depends on the token alone.
    assert torch.allclose(keys[0], keys[0][:, :1].expand_as(keys[0]), atol=1e-4)


def test_the_largest_attention_is_the_models_own(reader: CacheReader) -> None:
    """Against attention written down: softmax of scores, over prefix and what is read."""
    reading = reader.read(text(reader), PREFIX)
    seen: dict[int, list[torch.Tensor]] = {}

    def watch(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        rows, columns = queries.shape[1], keys.shape[1]
        mask = torch.arange(columns)[None] > torch.arange(columns - rows, columns)[:, None]
        for head in range(len(queries)):
            scores = queries[head] @ keys[head * HEADS // len(queries)].T / CHANNELS**0.5
            attention = scores.masked_fill(mask, -torch.inf).softmax(-1)[:, :PREFIX]
            seen.setdefault(layer, []).append(attention.amax(0))

    watcher = LargestAttention(PREFIX)
    reader.repeat(reading, watch)
    reader.repeat(reading, watcher)
    for layer in range(LAYERS):
        chunks = torch.stack(seen[layer]).view(-1, HEADS, PREFIX)
        assert torch.allclose(watcher.stacked()[layer].exp(), chunks.amax(0), atol=1e-5)


@pytest.mark.parametrize("distance", [1, 64, 300])
def test_attention_from_afar_is_the_models_own(reader: CacheReader, distance: int) -> None:
    """Read in parts, against attention of the whole text that is written down."""
    length = 600
    whole = Text("long", text(reader).tokens[:length], PROMPT, "sums")
    queries: dict[int, torch.Tensor] = {}
    keys: dict[int, torch.Tensor] = {}

    def watch(layer: int, new: torch.Tensor, seen: torch.Tensor, values: torch.Tensor) -> None:
        known = queries.get(layer)
        queries[layer] = new if known is None else torch.cat((known, new), 1)
        keys[layer] = seen

    watcher = LargestAttention(length, distance)
    reading = reader.read_watched(whole, length, watcher)
    reader.read_watched(whole, length, watch)
    assert torch.allclose(reading.keys, reader.read(whole, length).keys, atol=1e-4)
    apart = torch.arange(length)[:, None] - torch.arange(length)[None]
    found = watcher.stacked().exp()
    for layer in range(LAYERS):
        groups = len(queries[layer]) // HEADS
        scores = queries[layer] @ keys[layer].repeat_interleave(groups, 0).mT / CHANNELS**0.5
        attention = scores.masked_fill(apart < 0, -torch.inf).softmax(-1)
        far = attention.masked_fill(apart < distance, 0.0).amax(1).view(HEADS, -1, length).amax(1)
        assert torch.allclose(found[layer], far, atol=1e-5)
    assert (found[:, :, -distance:] == 0).all()


def test_reading_on_over_everything_changes_nothing(reader: CacheReader) -> None:
    reading = reader.read(text(reader), PREFIX, REST)
    measured = reader.judge(reading, reading.keys, reading.values)
    assert measured.shape[0] == REST - 1
    assert abs(measured[:, 0]).max() < 1e-5
    half = reader.judge(reading, reading.keys[:, :, ::2], reading.values[:, :, ::2])
    assert half[:, 0].mean() > 1e-3


# ---- dropping ----


@pytest.mark.parametrize("freed", [0.0, 0.3, 0.6])
def test_as_many_tokens_go_as_are_asked_for(freed: float, reader: CacheReader) -> None:
    reading = reader.read(text(reader), PREFIX, REST)
    how = Dropping(freed, recent=64)
    left = drop_once(reading, RandomScorer(0, 0), how)
    assert left.keys.shape == (LAYERS, HEADS, PREFIX - round(freed * PREFIX), CHANNELS)
    safe = {*range(PROMPT), *range(PREFIX - 64, PREFIX)}
    for head in left.positions.flatten(0, 1):
        assert safe <= set(head.tolist())
        assert torch.equal(head, head.sort().values)
    at = left.positions[1, 1]
    assert torch.equal(left.keys[1, 1], reading.keys[1, 1][at])
    assert torch.equal(left.values[1, 1], reading.values[1, 1][at])


def test_rounds_that_drop_nothing_read_the_same_cache(reader: CacheReader) -> None:
    reading = reader.read(text(reader), PREFIX, REST)
    left = drop_in_rounds(reader, reading, Recency(), Dropping(0.0, every=100))
    assert torch.allclose(left.keys, reading.keys, atol=1e-4)
    assert judge(reader, reading, Recency(), Dropping(0.0, every=100))[:, 0].max() < 1e-4


def test_rounds_drop_as_much_in_the_end_and_score_each_token_once(reader: CacheReader) -> None:
    reading = reader.read(text(reader), PREFIX, REST)
    scored: list[int] = []

    class Counting(Recency):
        def score(
            self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
        ) -> torch.Tensor:
            scored.extend(positions.tolist())
            return super().score(keys, values, positions)

    how = Dropping(0.4, recent=64, every=50)
    left = drop_in_rounds(reader, reading, Counting(), how)
    assert left.keys.shape[2] == PREFIX - round(0.4 * PREFIX)
    assert sorted(scored) == list(range(PROMPT, PREFIX - 64))


# ---- texts ----


def test_texts_are_told_apart_by_their_beginning(reader: CacheReader) -> None:
    one, cut = text(reader), Text("other", text(reader).tokens[:300], PROMPT, "cut")
    assert one.digest == cut.digest
    assert one.digest != text(reader, 1).digest


def test_folds_share_no_text_and_leave_none_out(reader: CacheReader) -> None:
    many = [text(reader, i) for i in range(7)]
    parts = folds(many, 3)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert folds(many[:2], 5) == [[0], [1]]


def test_solutions_are_cut_where_the_sum_begins(reader: CacheReader) -> None:
    for one in solutions(reader.tokenizer, 3, seed=5):
        assert one.cut is not None
        behind = str(reader.tokenizer.decode(one.tokens[one.cut :]))
        assert "Now I add" in behind
        assert len(behind.split("Now I add", maxsplit=1)[0]) < 40


# ---- training ----


def test_networks_learn_what_keys_and_values_say(reader: CacheReader, tmp_path: Path) -> None:
    from memshare.lab.probe.evaluate import rank_correlation
    from memshare.mechanisms.compaction.probe.network import ProbeNetwork

    texts = [text(reader, 17 * i) for i in range(5)]
    samples = Samples(tmp_path / "work", None, PREFIX).collect(texts, reader)
    how = Fit(hidden=16, steps=150, together=1)

    def correlation(how: Fit) -> float:
        tensors = fit(samples[:4], LAYERS, how, tmp_path / "work", "cpu", "test")

        def network(layer: int) -> ProbeNetwork:
            return ProbeNetwork({n: t[layer : layer + 1] for n, t in tensors.items()}, 2)

        return rank_correlation(samples[4:], LAYERS, network)

    assert correlation(how) > correlation(Fit(hidden=16, steps=1, together=1)) + 0.2


def test_what_follows_a_token_is_learned_from_as_well(reader: CacheReader, tmp_path: Path) -> None:
    one = text(reader)
    (repeated,) = Samples(tmp_path / "a", None, PREFIX).collect([one], reader)
    (both,) = Samples(tmp_path / "b", None, PREFIX, "repeat+future").collect([one], reader)
    future = LargestAttention(PREFIX, 64)
    reader.read_watched(one, PREFIX, future)
    for layer in range(LAYERS):
        wanted = (repeated.layer(layer)[2] + future.stacked()[layer].clamp(min=-20.0)) / 2
        assert torch.allclose(both.layer(layer)[2], wanted, atol=0.02)
    assert repeated.learned == slice(PROMPT, PREFIX)
    assert both.learned == slice(PROMPT, PREFIX - 128)


def test_a_stopped_run_goes_on_where_it_stopped(
    reader: CacheReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memshare.lab.probe import collect
    from memshare.lab.probe import fit as fitting

    texts = [text(reader, 17 * i) for i in range(3)]
    work = Samples(tmp_path / "work", None, PREFIX)
    work.collect(texts[:2], reader)
    read: list[str] = []
    write = collect._write
    monkeypatch.setattr(collect, "_write", lambda s, r: (read.append(s.text.name), write(s, r)))
    samples = work.collect(texts, reader)
    assert read == [texts[2].name]

    how = Fit(hidden=4, steps=3)
    whole = fit(samples, LAYERS, how, work.folder, "cpu", "test")
    next(work.folder.glob("*.layer")).unlink()
    trained: list[int] = []
    train: Callable[..., dict[str, torch.Tensor]] = fitting.fit_layer
    monkeypatch.setattr(fitting, "fit_layer", lambda *a: (trained.append(1), train(*a))[1])
    again = fit(samples, LAYERS, how, work.folder, "cpu", "test")
    assert trained == [1]
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_the_command_trains_judges_and_shows(
    model: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = ["--model", str(model), "--prefix", "300", "--continuation", "30", "--freed", "0.4"]
    train = ["--name", "tiny", "--steps", "40", "--hidden", "8", "--folds", "2", "--judged", "2"]
    assert main(["probe", "train", *common, "--texts", f"sums={texts}", *train]) == 0
    probe = read_probe(tmp_path / "cache/memshare/probes/tiny.safetensors")
    assert (probe.card.layers, probe.card.heads, probe.card.channels) == (LAYERS, HEADS, CHANNELS)
    assert probe.card.together == (HEADS, 1)
    assert [(row.kind, row.texts, row.tensor_parallel_size) for row in probe.card.judged] == [
        ("sums", 2, 1), ("sums", 2, HEADS),
    ]  # fmt: skip
    assert set(probe.card.rank_correlation) == {HEADS, 1}
    assert "| 2 sums | 300 | 40% | yes | 32 | 1 |" in capsys.readouterr().out

    others = tmp_path / "others"
    others.mkdir()
    (others / "new.txt").write_text(WORDS[7:])
    evaluate = ["probe", "evaluate", *common, "--recent", "64", "--scorers", "probe,random"]
    found = tmp_path / "rows.json"
    words = [*evaluate, "--texts", str(others), "--texts", str(texts), "--json", str(found)]
    assert main(words) == 0
    rows = json.loads(found.read_text())
    # What the probe was trained on is left out.
    assert [(row["scorer"], row["kind"], row["texts"]) for row in rows] == [
        ("probe", "others", 1), ("random", "others", 1),
    ]  # fmt: skip
    assert main([*evaluate, "--every", "64", "--record", "--texts", str(others)]) == 0
    recorded = read_probe(tmp_path / "cache/memshare/probes/tiny.safetensors")
    assert [
        (row.kind, row.every, row.recent, row.tensor_parallel_size)
        for row in recorded.card.judged
    ] == [
        ("others", 64, 64, 1), ("sums", 0, 32, 1), ("sums", 0, 32, HEADS),
    ]  # fmt: skip
    for together, named in probe.tensors.items():
        assert all(torch.equal(recorded.tensors[together][n], t) for n, t in named.items())
    alone = tmp_path / "alone.json"
    parallel = ["--tensor-parallel-size", str(HEADS)]
    words = [*evaluate, *parallel, "--texts", str(others), "--json", str(alone)]
    assert main(words) == 0
    damage = {row["scorer"]: row["kl"] for row in json.loads(alone.read_text())}
    assert damage["random"] == rows[1]["kl"]
    assert damage["probe"] != rows[0]["kl"]
    assert main([*evaluate, "--tensor-parallel-size", "3", "--texts", str(others)]) == 1
    assert "--tensor-parallel-size 3: the probe is for 1, 2" in capsys.readouterr().err
    assert main([*evaluate, "--texts", str(texts)]) == 1
    assert "was trained on each of these texts" in capsys.readouterr().err

    assert main(["probe", "show", "tiny"]) == 0
    assert "# Probe of tiny" in capsys.readouterr().out
    assert main(["probe", "show", "nothing"]) == 1
    assert "'nothing': there is no such file" in capsys.readouterr().err


def test_the_model_writes_texts_itself(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    output = tmp_path / "x.safetensors"
    words = ["probe", "train", "--model", str(model), "--prefix", "400", "--own", "2", "--steps"]
    assert main([*words, "2", "--hidden", "4", "--folds", "0", "--output", str(output)]) == 0
    (trained,) = read_probe(output).card.trained_on
    assert (trained.kind, trained.texts) == ("texts of its own", 2)


def test_a_padded_model_has_the_probe_of_its_original(
    model: Path,
    reader: CacheReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train = ["probe", "train", "--model", str(model), "--own", "2", "--steps", "2", "--hidden", "4"]
    assert main([*train, "--prefix", "300", "--name", "tiny", "--folds", "0"]) == 0
    copy = pad_heads(model, tmp_path / "copy", 4)
    assert main(["probe", "pad", "tiny", "--model", str(copy)]) == 0
    original, padded = (
        read_probe(tmp_path / f"memshare/probes/{name}.safetensors") for name in ("tiny", "copy")
    )
    assert (padded.card.heads, padded.card.together, padded.card.model) == (4, (4, 1), "copy")
    served = ServedModel(str(copy), LAYERS, 2, CHANNELS, ranks=2)
    assert find_probe(None, served) == tmp_path / "memshare/probes/copy.safetensors"

    wide = CacheReader(str(copy))
    readings = reader.read(text(reader), PREFIX), wide.read(text(wide), PREFIX)
    for before, after in ((HEADS, 4), (1, 1)):
        worth, of_copy = (
            probe.network(together).worth(reader.upright(reading.keys), reading.values)
            for probe, together, reading in zip(
                (original, padded), (before, after), readings, strict=True
            )
        )
        assert of_copy.shape == (LAYERS, 4, PREFIX)
        assert torch.allclose(of_copy[:, :HEADS], worth, atol=1e-3)

    capsys.readouterr()
    assert main(["probe", "pad", "tiny", "--model", str(model)]) == 1
    assert "is no copy of tiny with padded heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--texts", "nowhere"], "--texts nowhere: there is no folder nowhere"),
        (["--own", "0"], "there is nothing to train on; give --texts DIR or --own COUNT"),
        (["--name", "a/b"], "--name 'a/b': give letters"),
        (["--heads-together", "3"], "--heads-together 3: "),
    ],
)
def test_what_cannot_be_trained_is_refused(
    words: list[str], said: str, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["probe", "train", "--model", str(model), *words]) == 1
    assert said in capsys.readouterr().err


def test_work_of_another_model_is_not_mixed_in(tmp_path: Path) -> None:
    from memshare.errors import UserError

    Samples(tmp_path, (1.0,), PREFIX)
    with pytest.raises(UserError, match="another model has read"):
        Samples(tmp_path, (2.0,), PREFIX)


def test_short_texts_are_not_enough(reader: CacheReader, tmp_path: Path) -> None:
    from memshare.errors import UserError

    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match="no text in"):
        recorded_texts(tmp_path, reader.tokenizer, 1, "x")
