"""What the images hold, read from their recipes: no image is built for that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dockerfile_parse import DockerfileParser

from tools.kubernetes.layout import K8S, ROOT

RECIPES = K8S / "images"
VENV = "/opt/memshare/venv"

# Programs of the virtual environment that manifests may run, and the package that brings each.
PROGRAMS = {
    "python": "", "ray": "ray", "serve": "ray", "memshare": "memshare", "hf": "huggingface-hub",
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction of a recipe, its lines joined."""

    name: str
    value: str
    stage: int


class ImageRecipe:
    """One Dockerfile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.instructions = list(_instructions(path))
        self._last = max(instruction.stage for instruction in self.instructions)

    def final(self, name: str) -> list[str]:
        """Values of an instruction in the last stage, which is the image."""
        return [i.value for i in self.instructions if (i.name, i.stage) == (name, self._last)]

    @property
    def bases(self) -> list[str]:
        """Images that it starts from."""
        return [i.value.split()[0] for i in self.instructions if i.name == "FROM"]

    @property
    def user(self) -> int:
        """Number of the user that it runs as."""
        return int(self.final("USER")[-1].partition(":")[0])

    @property
    def home(self) -> str:
        """The home folder."""
        return self.environment["HOME"]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the image."""
        pairs = (pair.partition("=") for value in self.final("ENV") for pair in value.split())
        return {name: value for name, _, value in pairs}

    @property
    def copied(self) -> list[str]:
        """Files and folders of the project that any stage copies."""
        return [
            source
            for i in self.instructions
            if i.name == "COPY" and not i.value.startswith("--from")
            for source in i.value.split()[:-1]
        ]

    def installs(self, package: str) -> bool:
        """Whether the image's Debian packages include this one by name."""
        return any(
            package in value.replace(";", " ").replace("&&", " ").split()
            for value in self.final("RUN")
            if "apt-get install" in value
        )

    def has_module(self, module: str) -> bool:
        """Whether one of our modules is installed in it."""
        path = module.replace(".", "/")
        exists = (ROOT / f"{path}.py").is_file() or (ROOT / path / "__init__.py").is_file()
        return exists and path.partition("/")[0] in self.copied

    def has_path(self, path: str) -> bool:
        """Whether a recipe makes this path, or copies it from the project."""
        makes = any(f"--output {path}" in i.value for i in self.instructions if i.name == "RUN")
        copies = any(
            _is_copied(path, *i.value.split()) for i in self.instructions if i.name == "COPY"
        )
        return makes or copies

    def misses(self, command: list[str]) -> Iterator[str]:
        """What a command needs and the image has not."""
        program, *arguments = command
        if program not in PROGRAMS:
            yield f"the image is not known to have {program!r}"
        if arguments[:1] == ["-m"] and not self.has_module(arguments[1]):
            yield f"{arguments[1]} is not in the image"
        for argument in arguments:
            if argument.startswith("/opt/memshare/") and not self.has_path(argument):
                yield f"{argument} is not in the image"


@cache
def recipes() -> dict[str, ImageRecipe]:
    """All recipes, by the name of their image."""
    return {
        f"memshare-{path.name.removesuffix('.Dockerfile')}": ImageRecipe(path)
        for path in sorted(RECIPES.glob("*.Dockerfile"))
    }


def recipe_of(image: str) -> ImageRecipe | None:
    """The recipe of an image, whatever its registry and version."""
    name = re.sub(r"(@.*|:[^/]*)$", "", image).rpartition("/")[2]
    return recipes().get(name)


def _instructions(path: Path) -> Iterator[Instruction]:
    # A parser with a file object leaves the file alone; with a path it may write.
    with path.open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    stage = 0
    for item in structure:
        if item["instruction"] == "COMMENT":
            continue
        stage += item["instruction"] == "FROM"
        yield Instruction(item["instruction"], " ".join(item["value"].split()), stage)


def _is_copied(path: str, *words: str) -> bool:
    if words[0].startswith("--from"):
        return False
    *sources, target = words
    for source in sources:
        inside = Path(path).relative_to(target) if Path(path).is_relative_to(target) else None
        if inside is not None and (ROOT / source / inside).exists():
            return True
    return False
