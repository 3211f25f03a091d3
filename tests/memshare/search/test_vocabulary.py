"""The bytes of every token against what real tokenizers decode."""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memshare.search.steps import StepSegmenter, compile_delimiters
from memshare.search.vocabulary import token_bytes

PROSE = [
    "Wait, let me check that again.\n\nSo the sum of the first n numbers is n(n+1)/2.\n\n",
    "Hmm, naïve: 3 \u00d7 4 = 12, and 12 \u2212 5 = 7.\n\nOkay, so the answer is 7.\n",
]
COMMON = "aeinst .,\n=7é\u00d7\u0120\u010a\u2581\U0001f9e0"
TEXTS = st.text(st.sampled_from(COMMON) | st.characters(codec="utf-8"))
# DeepSeek's special tokens: word marks in a byte-level vocabulary, and at its very beginning.
DEEPSEEK_BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
DEEPSEEK_TOOL = "<\uff5ctool\u2581calls\u2581begin\uff5c>"


def wrap(tokenizer: Tokenizer, bos: str = "<s>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, clean_up_tokenization_spaces=False
    )


def byte_level(bos: str = "<s>", vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """GPT-2's kind, as Llama 3, Qwen and DeepSeek have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[bos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE * 4, trainer)
    added = ["<think>", DEEPSEEK_TOOL, "  \n  ", "\u2581mark"]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return wrap(tokenizer, bos)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Llama 2's kind: word marks, bytes as a last resort, raw newlines absent."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"aeinst.,=7", "\u0120", "\u010a", "\u2581s", "in"]
    merges = [("\u2581", "s"), ("i", "n")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return wrap(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """Gemma's kind: word marks, pieces with raw newlines, bytes as a last resort."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((f"<0x{b:02X}>", -20.0) for b in range(256))]
    pieces += [(piece, -3.0) for piece in ("\u2581", *"aeinst.,=7", "\u2581the", "\n\n", "é")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrap(tokenizer)


KINDS = {
    "byte-level": byte_level,
    "byte-level, DeepSeek's special tokens": partial(byte_level, DEEPSEEK_BOS),
    "byte-level, no merges": partial(byte_level, vocab_size=257),
    "SentencePiece BPE": sentencepiece_bpe,
    "Unigram": unigram,
}
# Models that `memshare model` or someone else has put into the user's cache.
CACHED = sorted(Path("~/.cache/memshare/models").expanduser().glob("*/tokenizer.json"))[:2]
KINDS |= {p.parent.name: partial(PreTrainedTokenizerFast.from_pretrained, p.parent) for p in CACHED}
CACHED_NAMES = {p.parent.name for p in CACHED}
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


@cache
def bytes_of(kind: str) -> list[bytes]:
    return token_bytes(tokenizer_of(kind))


@kinds
@given(text=TEXTS)
@example(text=PROSE[0] + PROSE[1])
@example(text="  lead and  trail \n\n\n")
@example(text="<think>\n\U0001f9e0\n</think>")
@example(text=f"a{DEEPSEEK_TOOL}b")
def test_bytes_in_a_row_are_the_decoded_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    written = b"".join(bytes_of(kind)[i] for i in ids)
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert written.decode(errors="replace") == decoded
    if kind not in CACHED_NAMES:  # a real one may lack rare bytes; these lack nothing
        assert written == decoded.encode()


@kinds
def test_every_id_has_bytes_and_special_tokens_have_none(kind: str) -> None:
    tokenizer, vocabulary = tokenizer_of(kind), bytes_of(kind)
    assert len(vocabulary) == len(tokenizer)
    special = set(tokenizer.all_special_ids)
    assert special
    assert all((vocabulary[i] == b"") == (i in special) for i in range(len(tokenizer)))


@kinds
def test_steps_end_where_the_text_says(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(PROSE[0] + PROSE[1], add_special_tokens=False)
    segmenter = StepSegmenter(compile_delimiters(["\n\n"], bytes_of(kind)), 1, 10_000)
    row, bounds = segmenter.feed(ids)
    steps = [tokenizer.decode(row[a:b]) for a, b in pairwise(bounds)]
    assert len(steps) == 3
    assert all(step.count("\n\n") == 1 for step in steps)


def test_what_the_kinds_test_is_what_they_say() -> None:
    newlines = {kind: tokenizer_of(kind).tokenize("\n\n") for kind in KINDS}
    assert newlines["byte-level, no merges"] == ["\u010a", "\u010a"]
    assert newlines["SentencePiece BPE"] == ["<0x0A>", "<0x0A>"]
    assert newlines["Unigram"] == ["\n\n"]
    deepseek = tokenizer_of("byte-level, DeepSeek's special tokens")
    assert deepseek.convert_ids_to_tokens(0) == DEEPSEEK_BOS


def test_ids_without_an_entry_write_nothing() -> None:
    class Holes:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 4

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
            return [["<s>", "\u0120a", None, "\u010a"][i] for i in ids]

    assert token_bytes(Holes()) == [b"", b" a", b"", b"\n"]
