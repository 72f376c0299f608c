"""Rules of the tree that import-linter cannot see: process groups, Ray, pickle, globals, ambient configuration."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGES, dotted_names, imports, parse, python_files

PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv"}

Rule = Callable[[ast.AST], bool]


def names_process_groups(tree: ast.AST) -> bool:
    return imports(tree, "torch.distributed") or any(
        name.startswith("torch.distributed") for name in dotted_names(tree)
    )


def imports_ray(tree: ast.AST) -> bool:
    return imports(tree, "ray")


def unpickles(tree: ast.AST) -> bool:
    return any(imports(tree, module) for module in PICKLES) or "torch.load" in dotted_names(tree)


def declares_global(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Global) for node in ast.walk(tree))


def reads_environment(tree: ast.AST) -> bool:
    return any(name in ENVIRONMENT for name in dotted_names(tree)) or imports(tree, "os.environ")


def branches_on_degree(tree: ast.AST) -> bool:
    """`if group.size > 1` and the like: degree 1 is the same object with identity collectives."""
    degrees = {"size", "tensor_size", "tp_size", "tp", "world_size"}
    for node in ast.walk(tree):
        test = node.test if isinstance(node, (ast.If, ast.IfExp)) else None
        if not isinstance(test, ast.Compare) or not isinstance(test.comparators[0], ast.Constant):
            continue
        subject = test.left.attr if isinstance(test.left, ast.Attribute) else getattr(test.left, "id", "")
        if subject in degrees and test.comparators[0].value == 1:
            return True
    return False


RAY_FILES = frozenset(
    {*(f"coordinator/{name}.py" for name in ("agents", "cluster", "places", "slots")), "worker/actor.py"}
)

# The rule, the folders it holds in, and the only files it does not hold for.
RULES: dict[str, tuple[Rule, tuple[str, ...], frozenset[str]]] = {
    "process groups": (names_process_groups, PACKAGES, frozenset({"parallel/mesh.py", "parallel/comm.py"})),
    "ray": (imports_ray, PACKAGES, RAY_FILES),
    "pickle": (unpickles, PACKAGES, frozenset()),
    "global": (declares_global, PACKAGES, frozenset()),
    "environment": (
        reads_environment,
        PACKAGES,
        frozenset({"echelon/cli/serve.py", "echelon/cli/doctor.py", "echelon/profiles.py"}),
    ),
    "degree": (branches_on_degree, ("worker", "models", "parallel"), frozenset({"parallel/comm.py"})),
}

VIOLATIONS = {
    "process groups": "def f():\n    import torch\n    torch.distributed.barrier()",
    "ray": "def f():\n    from ray import get",
    "pickle": "import torch\ntorch.load('x')",
    "global": "def f():\n    global x\n    x = 1",
    "environment": "import os\nos.environ['X']",
    "degree": "if group.size > 1:\n    pass",
}


@pytest.mark.parametrize("name", RULES)
def test_only_the_named_files_may(name: str) -> None:
    rule, folders, allowed = RULES[name]
    offenders = {path.as_posix() for path in python_files(folders) if rule(parse(path))}
    assert offenders <= allowed


@pytest.mark.parametrize("name", RULES)
def test_the_rule_sees_a_violation(name: str) -> None:
    rule, _, _ = RULES[name]
    assert rule(ast.parse(VIOLATIONS[name]))
    assert not rule(ast.parse("import os\nimport math\nif x > 1:\n    pass"))


def test_every_exception_is_a_file() -> None:
    existing = {path.as_posix() for path in python_files()}
    assert frozenset[str]().union(*(allowed for _, _, allowed in RULES.values())) <= existing


def test_modules_say_what_they_are() -> None:
    """In 3 to 8 lines for a module, at least one for a package."""
    assert [str(path) for path in python_files() if not _is_described(path)] == []


def _is_described(path: Path) -> bool:
    lines = (ast.get_docstring(parse(path)) or "").splitlines()
    if path.name == "__init__.py":
        return bool(lines)
    drawn = path.as_posix() == "echelon/errors.py"  # its docstring is the exception tree
    return len(lines) >= 3 and (sum(1 for line in lines if line.strip()) <= 8 or drawn)
