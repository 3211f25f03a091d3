"""What a mechanism is shown before anything loads, so that it can refuse what cannot work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memshare.config.model import MemShareConfig


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is known of an engine before it loads its model.

    Attributes:
        model: its folder or hub id.
        has_tokenizer: whether the engine process loads the tokenizer.
        layers: attention layers; 0 if that is not known.
        heads: KV heads of each on one rank.
        channels: of one head.
        ranks: how many ranks share the heads.
        changed: what makes the model another one than its own files say; None if nothing does.
        view_refusal: why attention cannot read its tables through a view; None if it can.
    """

    model: str
    has_tokenizer: bool
    layers: int = 0
    heads: int = 0
    channels: int = 0
    ranks: int = 1
    changed: str | None = None
    view_refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """A configuration, and the engine that it is for.

    Attributes:
        config: all of MemShare's options.
        engine: None while only the options are known: when a file is read or checked.
    """

    config: MemShareConfig
    engine: EngineFacts | None = None
