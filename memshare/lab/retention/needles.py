"""Texts that hide a number among small talk and ask for it at the end."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from memshare.lab.bench.workloads import Source
from memshare.lab.probe.texts import Text
from memshare.lab.problems import NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "needles"
_PROMPT = "Tell me about a day in the village, and remember the pass key that you mention."
_DEEDS = (
    "walked to", "looked at", "talked about", "came back from", "was tired of", "painted",
    "remembered", "read about", "sat down near", "dreamed of", "waited at", "sang on the way to",
)  # fmt: skip
_PLACES = (
    "the market", "the old bridge", "the river", "the school", "the garden", "the station",
    "the lighthouse", "the bakery", "the hill", "the library", "the harbour", "the mill",
)  # fmt: skip
_MOODS = (
    "It was a quiet morning.", "Nobody was in a hurry.", "The sun was warm.", "Later it rained.",
    "The birds were loud.", "It smelled of bread.", "Then they all went home.",
)  # fmt: skip
_QUESTION = "\n\nThe pass key that I mentioned above is"


def needles(
    tokenizer: PreTrainedTokenizerBase, count: int, prefix: int, seed: int = 0
) -> list[Text]:
    """``count`` texts, each cut at ``prefix`` tokens, of which the last ones are the key.

    The key stands in what the model has written, between a tenth and four fifths of the prefix.
    """
    source = Source(tokenizer, count, 0)
    prompt = source.chat(_PROMPT) if tokenizer.chat_template else source.ids(f"{_PROMPT}\n\n")
    texts = []
    for number in range(count):
        random = Random(seed + number)
        key = str(random.randrange(10_000, 100_000))
        depth = int(random.uniform(0.1, 0.8) * prefix)
        tokens, hidden = list(prompt), False
        while len(tokens) < prefix:
            if not hidden and len(tokens) >= depth:
                tokens += source.ids(f" The pass key is {key}. Remember it: {key} is the pass key.")
                hidden = True
            sentence = f" {random.choice(NAMES)} {random.choice(_DEEDS)} {random.choice(_PLACES)}."
            if random.random() < 0.3:
                sentence += f" {random.choice(_MOODS)}"
            tokens += source.ids(sentence)
        tokens = [*tokens[:prefix], *source.ids(f"{_QUESTION} {key}")]
        texts.append(Text(f"needle{number}", tuple(tokens), len(prompt), KIND, cut=prefix))
    return texts


def answer_tokens(tokenizer: PreTrainedTokenizerBase, text: Text) -> int:
    """How many of a needle's last tokens are its key."""
    assert text.cut is not None  # as every needle
    question = Source(tokenizer, 0, 0).ids(_QUESTION)
    return len(text.tokens) - text.cut - len(question)
