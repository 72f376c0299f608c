"""The text that the tiny model learns from: CPython's standard library and installed packages, each with its licence.

Read from the interpreter that runs this and from its site-packages; nothing is downloaded. A package is taken only if
its own metadata declares a licence that permits it and names none that asks for more. It knows no split and no token.
"""

from __future__ import annotations

import importlib
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePath
from pydoc_data.topics import topics

PYTHON = "python"
PYTHON_LICENCE = "PSF-2.0"
# Packages that an installation of `.[dev]` brings. What is absent is left out, and the corpus says so by its sources.
PACKAGES = (
    *("attrs", "anyio", "click", "filelock", "fsspec", "grimp", "h11", "huggingface_hub", "import-linter", "Jinja2"),
    *("jsonschema", "markdown-it-py", "mpmath", "mypy", "networkx", "numpy", "packaging", "pip", "pluggy", "protobuf"),
    *("prometheus_client", "psutil", "pydantic", "Pygments", "pytest", "PyYAML", "ray", "referencing", "requests"),
    *("rich", "safetensors", "setuptools", "sortedcontainers", "SQLAlchemy", "structlog", "sympy", "torch"),
    *("transformers", "truststore", "typer", "urllib3", "grpcio", "grpcio-status", "httpx2", "httpcore2"),
)
PERMITTED = re.compile(r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Zlib|CC0)\b", re.IGNORECASE)
REFUSED = re.compile(r"GPL|MPL|Mozilla|EUPL|proprietary|non-?commercial", re.IGNORECASE)
# Vendored folders are other projects, under licences of their own; a test's data is rather no text.
LEFT_OUT = {"_vendor", "vendor", "vendored", "thirdparty_files", "site-packages", "data", "testdata", "encoded_modules"}


@dataclass(frozen=True, slots=True)
class Document:
    """One file, or one page of documentation. source: `python` or the package."""

    source: str
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Licence:
    """What a source declares, and the version that it was taken from."""

    source: str
    version: str
    licence: str


def licences() -> list[Licence]:
    """Every source that is at hand. Raises ValueError for one whose licence does not permit it."""
    found = [Licence(PYTHON, platform.python_version(), PYTHON_LICENCE)]
    for name in PACKAGES:
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found.append(Licence(name, package.version, declared_licence(package)))
    return found


def declared_licence(package: Distribution) -> str:
    """The licence of a package's metadata, on one line. Raises ValueError unless it permits what is done here."""
    classifiers = [line.rpartition(" :: ")[2] for line in _metadata(package, "Classifier") if "License" in line]
    expressions = _metadata(package, "License-Expression") or _metadata(package, "License")
    stated = expressions[0] if expressions else " AND ".join(classifiers)
    line = " ".join(stated.splitlines()[:1]).strip()
    if REFUSED.search(stated) or not PERMITTED.search(line):
        raise ValueError(f"{_metadata(package, 'Name')[0]}: its licence is {line!r}, which is not known to permit this")
    return line


def documents(source: str) -> Iterator[Document]:
    """All text of a source, in an order that its paths alone decide."""
    if source == PYTHON:
        root = Path(sysconfig.get_path("stdlib"))
        yield from _files(source, root, sorted(root.rglob("*.py")))
        yield from _topics()
        yield from _docstrings()
        return
    package = distribution(source)
    paths = [Path(str(file.locate())) for file in package.files or () if file.suffix == ".py"]
    yield from _files(source, Path(str(package.locate_file(""))), sorted(path for path in paths if path.is_file()))
    for description in _metadata(package, "Description"):
        yield Document(source, "README", description)


def _metadata(package: Distribution, field: str) -> list[str]:
    """A field's values; a description is what stands behind all fields."""
    return [str(value) for value in package.metadata.get_all(field, [])]


def _files(source: str, root: Path, paths: list[Path]) -> Iterator[Document]:
    """Those in UTF-8 that are not left out."""
    for path in paths:
        inner = PurePath(path).relative_to(root)
        if LEFT_OUT & set(inner.parts) or inner.name.endswith(("_pb2.py", "_pb2_grpc.py")):
            continue
        try:
            yield Document(source, inner.as_posix(), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue


def _topics() -> Iterator[Document]:
    """The pages of Python's reference that help() shows."""
    for name in sorted(topics):
        yield Document(PYTHON, f"pydoc_data/topics/{name}", topics[name])


def _docstrings() -> Iterator[Document]:
    """Documentation strings of the modules that are compiled in, which have no source here."""
    for name in sorted(sys.builtin_module_names):
        module = importlib.import_module(name)
        parts = [f"{name}\n\n{module.__doc__ or ''}"]
        for attribute in sorted(vars(module)):
            value = getattr(module, attribute)
            parts += _described(f"{name}.{attribute}", value)
            if isinstance(value, type):
                members = sorted(vars(value))
                parts += [
                    text for member in members for text in _described(f"{attribute}.{member}", vars(value)[member])
                ]
        yield Document(PYTHON, f"docstrings/{name}", "\n\n".join(parts) + "\n")


def _described(name: str, value: object) -> list[str]:
    """A name and its documentation; nothing for values, whose types would speak in their place."""
    described = callable(value) or hasattr(value, "__get__")
    text = getattr(value, "__doc__", None) if described and not name.rpartition(".")[2].startswith("_") else None
    return [f"{name}\n    " + text.strip().replace("\n", "\n    ")] if isinstance(text, str) and text else []
