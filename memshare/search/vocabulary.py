"""The bytes of each token id, read from a Hugging Face tokenizer once at start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_WORD_MARK = "\u2581"  # SentencePiece writes a space so


class Tokenizer(Protocol):
    """The part of ``transformers.PreTrainedTokenizerBase`` that is needed."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of special tokens."""
        ...

    def __len__(self) -> int: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> Sequence[str | None]:
        """Raw vocabulary entries of ``ids``."""
        ...


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Bytes that every token id contributes to the text; empty for special tokens.

    Two writings of bytes in vocabulary entries exist in practice: GPT-2's byte-level alphabet, and
    SentencePiece's word mark with ``<0xNN>`` byte tokens. Which one it is shows in the entries.
    """
    special = set(tokenizer.all_special_ids)
    entries = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    decode = _byte_level_decoder() if _is_byte_level(entries) else None
    vocabulary: list[bytes] = []
    for token, entry in enumerate(entries):
        if entry is None or token in special:
            vocabulary.append(b"")
        elif decode is not None:  # but an added token is written as it reads
            known = all(char in decode for char in entry)
            vocabulary.append(bytes(decode[c] for c in entry) if known else entry.encode())
        elif (match := _BYTE_TOKEN.match(entry)) is not None:
            vocabulary.append(bytes([int(match[1], 16)]))
        else:
            vocabulary.append(entry.replace(_WORD_MARK, " ").encode())
    return vocabulary


def _is_byte_level(entries: Sequence[str | None]) -> bool:
    """GPT-2's alphabet writes space and newline as U+0120 and U+010A; SentencePiece has a mark.

    Counted, because either occurs in the other's vocabulary now and then: DeepSeek's special tokens
    hold word marks, and U+0120 is a letter of Maltese.
    """
    written = [entry for entry in entries if entry is not None]
    byte_level = sum(entry.startswith(("\u0120", "\u010a")) for entry in written)
    return byte_level > sum(entry.startswith(_WORD_MARK) for entry in written)


def _byte_level_decoder() -> dict[str, int]:
    """GPT-2's map: printable Latin-1 stands for itself, other bytes for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    decode = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    decode.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return decode
