"""The repository's own source as syntax trees, for the rules that the tests beside this file check."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("echelon", "coordinator", "worker", "parallel", "models")
SUPPORT = ("examples", "benchmarks", "tests", "protos")
GENERATED = ("echelon/v1", "echelon/internal/v1")


def python_files(folders: Iterable[str] = PACKAGES) -> list[Path]:
    """Hand-written Python files of the folders, relative to the root."""
    found = (path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if path.parent.as_posix() not in GENERATED]


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file given relative to the root."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.AST) -> set[str]:
    """Full names of everything imported anywhere in the tree, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(tree: ast.AST, module: str) -> bool:
    """Whether the tree imports the module or anything in it."""
    return any(name == module or name.startswith(f"{module}.") for name in imported_modules(tree))


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """Every attribute access on plain names, as written: `torch.distributed.new_group`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            dotted = _dotted(node)
            if dotted:
                yield dotted


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""
