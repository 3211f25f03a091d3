"""Folders that are whole or absent: atomic replacement, one writer at a time, a manifest.

Used for what is expensive to make and read by many processes, such as prepared models.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from memshare.errors import UserError

MANIFEST = "memshare-manifest.json"
CHUNK_BYTES = 1 << 22

# Called with the number of bytes just handled.
Advance = Callable[[int], object]


class FileEntry(BaseModel):
    """What is known of one file of a folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    """Bytes."""
    mtime_ns: int
    """Modification time, nanoseconds: tells, without reading the file, that it is untouched."""
    sha256: str


class Manifest(BaseModel):
    """Written last into a finished folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    """Names the source and the way it was made. Another recipe means another content."""
    files: dict[str, FileEntry]


def hash_file(path: Path, advance: Advance | None = None) -> str:
    """Return the SHA-256 of ``path`` in hex, reading it once."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def write_manifest(folder: Path, recipe: str) -> None:
    """Describe every file of ``folder`` in its manifest, and push all of it to the disk."""
    entries = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        # Synced before the rename that publishes the folder: after a power cut there must be no
        # folder with a valid name and empty files.
        with path.open("rb") as file:
            os.fsync(file.fileno())
        status = path.stat()
        entries[path.name] = FileEntry(
            size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=hash_file(path)
        )
    with (folder / MANIFEST).open("w") as file:
        file.write(Manifest(recipe=recipe, files=entries).model_dump_json(indent=2))
        file.flush()
        os.fsync(file.fileno())


def find_problem(folder: Path, recipe: str, *, thorough: bool = False) -> str | None:
    """Return what is wrong with a folder made by ``recipe``, or None if it is sound.

    A file whose size and modification time are those of the manifest is trusted, so the usual
    check reads nothing; a file with another time is hashed. ``thorough`` hashes every file.
    Does not modify the folder.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return f"{folder} has no {MANIFEST}"
    except ValidationError:
        return f"{folder / MANIFEST} is damaged"
    if manifest.recipe != recipe:
        return f"{folder} was made in another way ({manifest.recipe})"
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        status = path.stat()
        if status.st_size != entry.size:
            return f"{path} has {status.st_size:,} bytes instead of {entry.size:,}"
        untouched = status.st_mtime_ns == entry.mtime_ns
        if (thorough or not untouched) and hash_file(path) != entry.sha256:
            return f"{path} has been changed (its SHA-256 differs)"
    return None


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the right to replace ``target``; wait for another process that holds it.

    The lock is a file beside the target, released by the kernel even if the process is killed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {target}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends without an exception.

    After an exception, or a kill at any moment, ``target`` is what it was before (or, for the
    instant between two renames, absent). Call it under ``locked(target)``: leftovers of killed
    runs are removed here, and without the lock they might be a living one's.

    Raises:
        UserError: ``target`` exists and is not a folder with a manifest; it is not ours to replace.
    """
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not (target / MANIFEST).is_file():
        raise UserError(f"{target} exists and was not made by memshare: move it, or name another")
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        partial, old = work / "new", work / "old"
        partial.mkdir()
        yield partial
        # As readable as the folder itself: safetensors lets only the owner read what it writes.
        readable = partial.stat().st_mode & 0o666
        for path in partial.iterdir():
            if path.is_file():
                path.chmod(readable)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        shutil.rmtree(work)
