"""Run a command the way a pod runs it: unprivileged, on a read-only file system.

    python tools/confine.py --mount MODEL:/opt/memshare/models/smollm2-135m -- serve run ...

The command runs as another user, without capabilities and without the way to get any, in a mount
namespace of its own in which only /tmp, its home folder and shared memory can be written. Other
users' private folders on the way to Python are replaced by empty ones. Needs root and Linux
(util-linux: unshare, mount, setpriv); nothing outside the namespace is changed.
"""

from __future__ import annotations

import argparse
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USER = 10001  # as in k8s/base/rayservice.yaml and k8s/images
HOME = Path("/home/memshare")


def inside(command: list[str], mounts: list[tuple[Path, Path]], scratch: Path, user: int) -> None:
    """Set up this process's mount namespace and become ``command``. Does not return."""
    for name in ("tmp", "home", "keep", "overlay"):
        (scratch / name).mkdir()
    for name in ("tmp", "home"):
        os.chown(scratch / name, user, user)
    _mount("-t", "tmpfs", "tmpfs", scratch / "overlay")
    # Held first: they may lie in a folder that is hidden next.
    mounts = [(_keep(source, scratch), target) for source, target in mounts]
    needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix)]
    _show(needed, scratch / "tmp")
    locked = list(_hide_private_folders(needed, scratch))
    targets = [*(target for _, target in mounts), HOME]
    for top in sorted({Path("/", target.parts[1]) for target in targets if not target.exists()}):
        locked.append(_extend(top, scratch / "overlay"))
    for source, target in mounts:
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        _mount("--bind", source, target)
        locked.append(target)
    HOME.mkdir(parents=True, exist_ok=True)
    for path in (*locked, Path("/")):
        _mount("-o", "remount,bind,ro", path)
    for source, target in ((scratch / "home", HOME), (scratch / "tmp", Path("/tmp"))):
        _mount("--rbind", source, target)
        _mount("-o", "remount,bind,rw", target)
    os.environ.update(HOME=str(HOME), TMPDIR="/tmp", USER="memshare")
    number = str(user)
    os.chdir("/tmp")
    os.execvp(
        "setpriv",
        [
            *("setpriv", "--reuid", number, "--regid", number, "--clear-groups"),
            *("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", *command),
        ],
    )


def _show(needed: Iterable[Path], tmp: Path) -> None:
    """Let what lies in /tmp be seen, and not written, in the folder that is about to hide it."""
    for path in needed:
        shown = tmp / path.relative_to("/tmp") if path.is_relative_to("/tmp") else None
        if shown is not None and not shown.exists():
            shown.mkdir(parents=True)
            _mount("--bind", path, shown)
            _mount("-o", "remount,bind,ro", shown)


def _hide_private_folders(needed: Iterable[Path], scratch: Path) -> Iterator[Path]:
    """Make the needed paths reachable for everybody; yields what was mounted."""
    private: dict[Path, list[Path]] = {}
    for path in needed:
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & stat.S_IXOTH:
                private.setdefault(parent, []).append(path)
                break
    for parent, paths in private.items():
        kept = [(_keep(path, scratch), path) for path in paths]
        _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", parent)
        yield parent
        for keep, path in kept:
            path.mkdir(parents=True, exist_ok=True)
            _mount("--bind", keep, path)
            yield path


def _keep(path: Path, scratch: Path) -> Path:
    """Bind a file or folder to a place that stays; returns that."""
    keep = scratch / "keep" / str(len(list((scratch / "keep").iterdir())))
    if path.is_dir():
        keep.mkdir()
    else:
        keep.touch()
    _mount("--bind", path, keep)
    return keep


def _extend(folder: Path, overlay: Path) -> Path:
    """Let new folders be made in a folder, without touching the real one; returns it."""
    upper, work = overlay / folder.name, overlay / f"{folder.name}-work"
    upper.mkdir()
    work.mkdir()
    options = f"lowerdir={folder},upperdir={upper},workdir={work}"
    _mount("-t", "overlay", "overlay", "-o", options, folder)
    return folder


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def _pair(text: str) -> tuple[Path, Path]:
    source, separator, target = text.partition(":")
    if not separator or not Path(target).is_absolute() or not Path(source).exists():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not SOURCE:/TARGET with a source that exists"
        )
    return Path(source).resolve(), Path(target)


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--mount", type=_pair, action="append", default=[], metavar="FROM:TO")
    parser.add_argument("--user", type=int, default=USER, help="number; default: %(default)s")
    parser.add_argument("--scratch", type=Path, help="an empty folder for what the command writes")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("name a command")
    if args.inside:
        inside(command, args.mount, args.scratch, args.user)
    if os.geteuid() != 0:
        parser.error("only root may set up the mounts: run it with sudo")
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="memshare-confined-"))
    print(f"[confine] what the command writes is kept in {scratch}", file=sys.stderr)
    again = [sys.executable, str(Path(__file__).resolve()), "--inside", "--scratch", str(scratch)]
    for source, target in args.mount:
        again += ["--mount", f"{source}:{target}"]
    again += ["--user", str(args.user), "--", *command]
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", *again])


if __name__ == "__main__":
    sys.exit(main())
