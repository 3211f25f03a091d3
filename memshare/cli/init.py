"""``memshare init``: write a shipped configuration into the current folder, to be edited."""

from __future__ import annotations

import argparse
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from memshare.errors import UserError

_DEFAULT = "cluster"


def configurations() -> dict[str, Traversable]:
    """The shipped files, by name."""
    folder = files("memshare") / "configs"
    found = [*folder.iterdir(), *(folder / "simulate").iterdir()]
    return {
        file.name.removesuffix(".yaml"): file
        for file in sorted(found, key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Write one of the shipped configurations into the current folder, for you to edit. A file "
        "that is there already is left alone."
    )
    parser.add_argument("name", nargs="?", default=_DEFAULT, metavar="NAME", help="which one")
    parser.add_argument("--list", action="store_true", help="say which there are, and write none")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: NAME.yaml")


def run(args: argparse.Namespace) -> int:
    """Write a file, or list what there is.

    Raises:
        UserError: there is none of that name, or the file cannot be written.
    """
    known = configurations()
    if args.list:
        for name, file in known.items():
            print(f"{name:<16} {_purpose(file)}")
        return 0
    if args.name not in known:
        raise UserError(f"no configuration {args.name!r}: choose one of {', '.join(known)}")
    target = args.output or Path(f"{args.name}.yaml")
    text = known[args.name].read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as written:
            written.write(text)
    except FileExistsError:
        raise UserError(f"{target} exists, and is left alone: name another with --output") from None
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    print(f"wrote {target}: {_purpose(known[args.name])}")
    return 0


def _purpose(file: Traversable) -> str:
    """The first sentence of the comment that a configuration begins with."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip("# ") == "" or not line.startswith("#"):
            break
        lines.append(line.removeprefix("# "))
    sentence = " ".join(lines).partition(". ")[0]
    return sentence.rstrip(".:")
