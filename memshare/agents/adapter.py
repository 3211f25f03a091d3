"""A LoRA adapter as peft writes it: what it says about itself, and its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from memshare.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_ATTENTION = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.self_attn\.(?P<part>\w+)")


class PeftSettings(BaseModel):
    """What we read of ``adapter_config.json``; peft writes more, which changes nothing here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: str
    r: int
    base_model_name_or_path: str | None = None
    bias: str = "none"
    use_dora: bool = False
    lora_bias: bool = False
    use_qalora: bool = False
    modules_to_save: list[str] | None = None
    alora_invocation_tokens: list[int] | None = None
    layer_replication: list[list[int]] | None = None
    use_bdlora: Any = None
    fan_in_fan_out: bool = False


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module that an adapter changes: ``x W`` becomes ``x W + s x A B``.

    Attributes:
        name: in the base model, without peft's prefix.
        layer: index of its decoder layer; None outside of attention.
        part: ``q_proj``, ``v_proj`` and so on; the whole name outside of attention.
        rank: rows of A.
        inputs: columns of A.
        outputs: rows of B.
    """

    name: str
    layer: int | None
    part: str
    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        name: by which requests ask for it.
        folder: where it is.
        settings: what its file of settings says.
        modules: what it changes.
        digest: of both files, in hexadecimal: another one is another adapter.
    """

    name: str
    folder: Path
    settings: PeftSettings
    modules: tuple[LoraModule, ...]
    digest: str

    @property
    def rank(self) -> int:
        """The highest of its modules' ranks."""
        return max((module.rank for module in self.modules), default=0)

    @property
    def value_rank(self) -> int:
        """The highest rank on ``v_proj``: columns that its low-rank part takes. 0: it has none."""
        return max((m.rank for m in self.modules if m.part == "v_proj"), default=0)

    def value_down(self) -> dict[int, Tensor]:
        """The A matrices of ``v_proj``, ``[rank, hidden]``, by layer."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return {
                parts.layer: file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 - no mapping
                if (parts := _parse(name)) is not None
                and parts.half == "A"
                and parts.part == "v_proj"
                and parts.layer is not None
            }


def read_adapter(name: str, folder: Path) -> Adapter:
    """Read an adapter; of its tensors only names and shapes.

    Args:
        name: by which requests ask for it.
        folder: what peft's ``save_pretrained`` wrote.

    Raises:
        ConfigError: there is no adapter, or it cannot be read. Names the field and the fix.
    """
    settings = _read_settings(name, folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = folder / "adapter_model.bin"
        fix = "save it with safe_serialization=True" if pickled.is_file() else _GIVE
        raise _wrong(name, folder, f"has no {WEIGHTS}", fix)
    try:
        modules = tuple(_modules(weights))
    except (SafetensorError, OSError) as error:
        raise _wrong(name, folder, f"{WEIGHTS} cannot be read ({error})", _AGAIN) from None
    except ValueError as error:
        raise _wrong(name, folder, str(error), _AGAIN) from None
    return Adapter(name, folder, settings, modules, digest_of(folder))


def digest_of(folder: Path) -> str:
    """The digest of an adapter's contents as they are now.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    for file in (SETTINGS, WEIGHTS):
        with (folder / file).open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


_GIVE = "give the folder that peft's save_pretrained wrote"
_AGAIN = "save the adapter again, with peft's save_pretrained"


def _wrong(name: str, folder: Path, what: str, fix: str) -> ConfigError:
    return ConfigError(f"agents.adapters.{name} = {str(folder)!r}: {what}\n    fix: {fix}")


def _read_settings(name: str, folder: Path) -> PeftSettings:
    file = folder / SETTINGS
    if not file.is_file():
        what = f"has no {SETTINGS}" if folder.is_dir() else "there is no such folder"
        raise _wrong(name, folder, what, _GIVE)
    try:
        return PeftSettings.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # also what json and pydantic raise
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        else:
            what = str(error)
        raise _wrong(name, folder, f"{SETTINGS} cannot be read ({what})", _AGAIN) from None


@dataclass(frozen=True, slots=True)
class _TensorName:
    module: str
    half: str
    layer: int | None
    part: str


def _parse(name: str) -> _TensorName | None:
    found = _TENSOR.fullmatch(name)
    if found is None:
        return None
    module = found["module"]
    attention = _ATTENTION.fullmatch(module)
    if attention is None:
        return _TensorName(module, found["half"], None, module.rpartition(".")[2])
    return _TensorName(module, found["half"], int(attention["layer"]), attention["part"])


def _modules(weights: Path) -> Iterator[LoraModule]:
    shapes: dict[str, dict[str, tuple[_TensorName, list[int]]]] = {}
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            parts = _parse(name)
            if parts is None:
                raise ValueError(f"{WEIGHTS} holds {name!r}, which is no LoRA matrix")
            halves = shapes.setdefault(parts.module, {})
            halves[parts.half] = parts, list(file.get_slice(name).get_shape())
    for module, halves in sorted(shapes.items()):
        if halves.keys() != {"A", "B"}:
            raise ValueError(f"{WEIGHTS} holds only one of the two matrices of {module}")
        (parts, down), (_, up) = halves["A"], halves["B"]
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise ValueError(f"{WEIGHTS}: A {down} and B {up} of {module} do not go together")
        yield LoraModule(module, parts.layer, parts.part, down[0], down[1], up[0])


def adapters_by_name(folders: Mapping[str, Path]) -> list[Adapter]:
    """Read all adapters of a configuration, in its order.

    Raises:
        ConfigError: see :func:`read_adapter`.
    """
    return [read_adapter(name, folder) for name, folder in folders.items()]
