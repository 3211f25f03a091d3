"""The modules of a version of vLLM, installed or in a wheel, and what they define."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from zipfile import ZipFile

_DEPTH = 8  # of star imports and base classes that are followed


class Sources:
    """Source of Python modules by their dotted names."""

    def __init__(self, files: Mapping[str, str]) -> None:
        """Take sources by path, as ``vllm/config/__init__.py``."""
        self._modules = {_module(path): text for path, text in files.items()}
        self._packages = {_module(path) for path in files if path.endswith("/__init__.py")}
        self._trees: dict[str, ast.Module] = {}

    @classmethod
    def of_wheel(cls, file: Path) -> Sources:
        """Those in a wheel."""
        with ZipFile(file) as wheel:
            names = [n for n in wheel.namelist() if n.startswith("vllm/") and n.endswith(".py")]
            return cls({name: wheel.read(name).decode() for name in names})

    @classmethod
    def of_folder(cls, folder: Path) -> Sources:
        """Those of an installed package."""
        return cls(
            {
                file.relative_to(folder.parent).as_posix(): file.read_text(encoding="utf-8")
                for file in folder.rglob("*.py")
            }
        )

    def has(self, module: str) -> bool:
        """Whether there is such a module."""
        return module in self._modules

    def defines(self, module: str, name: str, depth: int = _DEPTH) -> bool:
        """Whether ``from module import name`` would find something."""
        if self.has(f"{module}.{name}"):
            return True
        if not self.has(module) or not depth:
            return False
        return any(
            found == name or (star and self.defines(source, name, depth - 1))
            for found, star, source in self._names(module)
        )

    def homes(self, name: str) -> list[str]:
        """Modules in which a class or function of this name is written."""
        wanted = (f"def {name}(", f"class {name}(", f"class {name}:")
        return sorted(m for m, text in self._modules.items() if any(w in text for w in wanted))

    def members(self, module: str, owner: str, depth: int = _DEPTH) -> set[str] | None:
        """Attributes and methods of a class and of those that it extends; None if there is none."""
        if not self.has(module) or not depth:
            return None
        body = self._tree(module).body
        for node in _statements(body):
            if isinstance(node, ast.ClassDef) and node.name == owner:
                found = set(_members(node))
                for base in node.bases:
                    name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
                    found |= self.members(module, name, depth - 1) or set()
                return found
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == owner:
                        return self.members(self._source(node, module), alias.name, depth - 1)
        return None

    @cached_property
    def version(self) -> str:
        """As its own generated file says; ``unknown`` if it says nothing."""
        for line in self._modules.get("vllm._version", "").splitlines():
            name, _, value = line.partition(" = ")
            if name.strip() in ("__version__ = version", "__version__", "version") and value:
                return value.strip("'\" ").rpartition("= ")[2].strip("'\"")
        return "unknown"

    def _tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            self._trees[module] = ast.parse(self._modules[module])
        return self._trees[module]

    def _source(self, node: ast.ImportFrom, module: str) -> str:
        """The module that a ``from`` within a module names."""
        if not node.level:
            return node.module or ""
        up = node.level - (module in self._packages)
        parts = module.split(".")
        return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])

    def _names(self, module: str) -> Iterator[tuple[str, bool, str]]:
        """(name, whether it is a star, module that a star is of) of what a module binds."""
        for node in _statements(self._tree(module).body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.name, False, ""
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            yield part.id, False, ""
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id, False, ""
            elif isinstance(node, ast.Import | ast.ImportFrom):
                source = self._source(node, module) if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    yield alias.asname or alias.name, alias.name == "*", source


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, whichever way it goes."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _members(owner: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(owner):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                    yield part.attr
                elif isinstance(part, ast.Name) and part.id != "self":
                    yield part.id
