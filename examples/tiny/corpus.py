"""Packs text into one file: filtered, without duplicates, split into training and held-out documents by their content.

    python -m examples.tiny.corpus CORPUS.jsonl.xz

The same installation makes the same corpus. The first line is the manifest, each other line a document. A held-out
document is one whose SHA-256 begins with a small number, so a document never changes sides. It knows no token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.make_checkpoint import BEGIN, END
from examples.tiny.sources import Document, documents, licences

HELD_OUT_SHARE = 0.02
CHARACTERS = range(200, 200_000)  # of a document
LONGEST_LINE, LEAST_LETTERS = 400, 0.55
LONG_LINE = 20  # characters of a line that says something about whose it is
MOST_KNOWN = 0.4  # of a document's long lines may stand in earlier ones
PRESET = 6


@dataclass(frozen=True, slots=True)
class Corpus:
    """What was packed; manifest: licences, counts and the digest."""

    manifest: Mapping[str, Any]
    training: tuple[Document, ...]
    held_out: tuple[Document, ...]


def is_held_out(text: str) -> bool:
    """By the first 32 bits of the SHA-256 of the text."""
    return int(digest_of(text)[:8], 16) < HELD_OUT_SHARE * 2**32


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_text(text: str) -> bool:
    """Whether it reads as code or prose: of a fair length, with more letters and space than tables of numbers have."""
    if len(text) not in CHARACTERS or BEGIN in text or END in text:
        return False
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return max(map(len, text.splitlines())) <= LONGEST_LINE and letters >= LEAST_LETTERS * len(text)


class Lines:
    """The long lines of all documents so far."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def share_known(self, text: str) -> float:
        """Of a document's long lines; 0 if it has none."""
        lines = long_lines(text)
        return sum(line in self._seen for line in lines) / len(lines) if lines else 0.0

    def add(self, text: str) -> None:
        self._seen.update(long_lines(text))


def long_lines(text: str) -> list[bytes]:
    """Hashes of them, without the space around them."""
    lines = (line.strip() for line in text.splitlines())
    return [hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines if len(line) >= LONG_LINE]


def without_duplicates(found: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, by their digests.

    Held-out ones come first, so that a document of which much stands in them is not trained on.
    """
    unique = {digest_of(document.text): document for document in found}
    ordered = [unique[digest] for digest in sorted(unique)]
    seen, kept = Lines(), ([], [])  # type: tuple[Lines, tuple[list[Document], list[Document]]]
    for side, wanted in ((1, True), (0, False)):
        for document in ordered:
            if is_held_out(document.text) is wanted and seen.share_known(document.text) <= MOST_KNOWN:
                seen.add(document.text)
                kept[side].append(document)
    return kept


def known_lines(training: Iterable[Document], held_out: Iterable[Document]) -> float:
    """The share of held-out long lines that training text has too: imports, licences, what everybody writes."""
    seen = Lines()
    for document in training:
        seen.add(document.text)
    return seen.share_known("\n".join(document.text for document in held_out))


def write_corpus(path: Path, found: Iterable[Document], named: list[dict[str, str]]) -> Mapping[str, object]:
    """Writes what is kept of the documents; the manifest."""
    training, held_out = without_duplicates(document for document in found if is_text(document.text))
    manifest = {
        "sources": named,
        "training": counts(training),
        "held_out": counts(held_out),
        "held_out_rule": f"SHA-256 of the text below {HELD_OUT_SHARE} of its range",
        "held_out_lines_known": round(known_lines(training, held_out), 4),
        "digest": digest_of("".join(document.text for document in (*held_out, *training))),
    }
    with lzma.open(path, "wt", encoding="utf-8", preset=PRESET) as file:
        file.write(json.dumps(manifest) + "\n")
        for side, kept in (("held_out", held_out), ("training", training)):
            for document in kept:
                entry = {"side": side, "source": document.source, "path": document.path, "text": document.text}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return manifest


def counts(kept: Iterable[Document]) -> Mapping[str, Mapping[str, int]]:
    """Documents and bytes of each source."""
    number, size = Counter[str](), Counter[str]()
    for document in kept:
        number[document.source] += 1
        size[document.source] += len(document.text.encode())
    return {source: {"documents": number[source], "bytes": size[source]} for source in sorted(number)}


def read_corpus(path: Path) -> Corpus:
    """What write_corpus wrote. Raises ValueError where the text is not that of the manifest."""
    sides: defaultdict[str, list[Document]] = defaultdict(list)
    with lzma.open(path, "rt", encoding="utf-8") as file:
        manifest = json.loads(next(file))
        for line in file:
            entry = json.loads(line)
            sides[entry["side"]].append(Document(entry["source"], entry["path"], entry["text"]))
    training, held_out = sides["training"], sides["held_out"]
    if manifest["digest"] != digest_of("".join(document.text for document in (*held_out, *training))):
        raise ValueError(f"{path}: the text is not what its manifest says; pack it again")
    return Corpus(manifest, tuple(training), tuple(held_out))


def all_documents(sources: Iterable[str]) -> Iterator[Document]:
    """Of every source, trailing space and other ends of lines put right."""
    for source in sources:
        for document in documents(source):
            text = re.sub(r"[ \t]+\n", "\n", document.text.replace("\r\n", "\n"))
            yield Document(source, document.path, text)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    output: Path = parser.parse_args().output
    named = [{"source": entry.source, "version": entry.version, "licence": entry.licence} for entry in licences()]
    output.parent.mkdir(parents=True, exist_ok=True)
    manifest = write_corpus(output, all_documents(entry["source"] for entry in named), named)
    print(json.dumps(manifest, indent=2))
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
