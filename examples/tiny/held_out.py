"""Writes the held-out text that ships beside the tiny model: documents of Python itself, and their licence.

    python -m examples.tiny.held_out CORPUS.jsonl.xz DIRECTORY

As JSON lines, for `echelon eval perplexity`. Documents of packages stay in the corpus: each has a licence of its own
that would have to travel with it. It knows no model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from examples.tiny.corpus import read_corpus
from examples.tiny.sources import PYTHON, Document

MOST_BYTES = 192 << 10
LONGEST_BYTES = 40_000  # of a document, so that no single one decides
TEXT, LICENCE = "held_out.jsonl", "LICENSE-PYTHON.txt"


def chosen(documents: Iterable[Document], most_bytes: int = MOST_BYTES) -> list[Document]:
    """Python's, in the order of the corpus, that of their digests, as long as they fit."""
    kept: list[Document] = []
    for document in documents:
        size = len(document.text.encode())
        if document.source == PYTHON and size <= min(LONGEST_BYTES, most_bytes):
            kept.append(document)
            most_bytes -= size
    return kept


def write_held_out(documents: Iterable[Document], directory: Path) -> int:
    """Writes text and licence; the bytes of the text. Raises FileNotFoundError without Python's licence."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", directory / LICENCE)
    kept = chosen(documents)
    lines = (json.dumps({"path": document.path, "text": document.text}, ensure_ascii=False) for document in kept)
    (directory / TEXT).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return sum(len(document.text.encode()) for document in kept)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    size = write_held_out(read_corpus(options.corpus).held_out, options.directory)
    print(f"{options.directory / TEXT}: {size:,} bytes of text")


if __name__ == "__main__":
    main()
