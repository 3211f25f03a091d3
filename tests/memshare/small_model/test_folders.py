"""Folders that are whole or absent (memshare/small_model/folders.py)."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from memshare.errors import UserError
from memshare.small_model.folders import MANIFEST, find_problem, locked, replacing, write_manifest

RECIPE = "test 1"


def make(target: Path, text: str = "weights") -> Path:
    """Make a folder of two files, with a manifest, at ``target``."""
    with locked(target), replacing(target) as partial:
        (partial / "a.bin").write_text(text)
        (partial / "b.bin").write_text("more")
        write_manifest(partial, RECIPE)
    return target


def test_a_finished_folder_is_sound_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = make(tmp_path / "model")

    assert find_problem(target, RECIPE, thorough=True) is None
    assert sorted(path.name for path in target.iterdir()) == ["a.bin", "b.bin", MANIFEST]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "model"]


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "is missing"),
        (lambda folder: (folder / "a.bin").write_text("short"), "5 bytes instead of 7"),
        (lambda folder: (folder / "a.bin").write_text("WEIGHTS"), "SHA-256 differs"),
        (lambda folder: (folder / MANIFEST).write_text('{"recipe": '), "is damaged"),
        (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}"),
    ],
    ids=["missing", "truncated", "changed", "manifest-damaged", "manifest-missing"],
)
def test_the_quick_check_finds_damage(tmp_path: Path, damage, finding: str) -> None:
    target = make(tmp_path / "model")
    damage(target)

    assert finding in (find_problem(target, RECIPE) or "")


def test_only_the_thorough_check_reads_files_that_look_untouched(tmp_path: Path) -> None:
    target = make(tmp_path / "model")
    status = (target / "a.bin").stat()
    (target / "a.bin").write_text("WEIGHTS")
    os.utime(target / "a.bin", ns=(status.st_atime_ns, status.st_mtime_ns))

    assert find_problem(target, RECIPE) is None
    assert "SHA-256 differs" in (find_problem(target, RECIPE, thorough=True) or "")


def test_a_touched_but_equal_file_is_sound(tmp_path: Path) -> None:
    target = make(tmp_path / "model")
    os.utime(target / "a.bin")

    assert find_problem(target, RECIPE) is None


def test_another_recipe_is_a_problem(tmp_path: Path) -> None:
    target = make(tmp_path / "model")

    assert "another way" in (find_problem(target, "test 2") or "")


def test_a_failed_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    target = make(tmp_path / "model", "weights")

    def fail_half_way() -> None:
        with replacing(target) as partial:
            (partial / "a.bin").write_text("half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way()

    assert find_problem(target, RECIPE, thorough=True) is None
    assert [path.name for path in tmp_path.glob(".model.partial-*")] == []


def test_a_replacement_replaces(tmp_path: Path) -> None:
    make(tmp_path / "model", "weights")
    target = make(tmp_path / "model", "newer weights")

    assert (target / "a.bin").read_text() == "newer weights"
    assert find_problem(target, RECIPE, thorough=True) is None


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.tex").write_text("years of work")

    with pytest.raises(UserError, match="not made by memshare"):
        make(target)
    assert (target / "chapter.tex").read_text() == "years of work"


def write_half_and_hang(target: Path, writing: Event) -> None:
    """In another process: begin a replacement and never finish it."""
    with locked(target), replacing(target) as partial:
        (partial / "a.bin").write_text("half")
        writing.set()
        signal.pause()


def test_a_killed_writer_leaves_no_folder_and_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writing = context.Event()
    target = tmp_path / "model"
    process = context.Process(target=write_half_and_hang, args=(target, writing))
    process.start()
    assert writing.wait(30)
    process.kill()
    process.join()
    assert not target.exists()

    make(target)

    assert find_problem(target, RECIPE, thorough=True) is None
    assert list(tmp_path.glob(".model.partial-*")) == []


def append_twice(target: Path, log: Path, name: str) -> None:
    """In another process: write two lines while holding the lock."""
    for _ in range(20):
        with locked(target):
            for moment in ("in", "out"):
                with log.open("a") as file:
                    file.write(f"{name} {moment}\n")


def test_only_one_process_holds_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [
        context.Process(target=append_twice, args=(tmp_path / "model", log, name)) for name in "abc"
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0

    lines = log.read_text().splitlines()
    assert len(lines) == 120
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert entered.removesuffix(" in") == left.removesuffix(" out")
