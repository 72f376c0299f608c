"""The texts that the tiny model is shown with: its held-out documents, prompts cut from them, and kinds of text.

All of it comes from what ships beside the checkpoint and from the prompts of many languages beside make_checkpoint.py.
It knows no model and no cluster.
"""

from __future__ import annotations

import ast
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from examples.make_checkpoint import PROMPTS
from examples.tiny.held_out import TEXT

MODEL = Path(__file__).with_name("model")
PIECE_CHARACTERS = 800  # of ASCII: never more tokens than the context
KIND_PIECES = 24
PROMPT_LINES = 12
LEAST_LINES = 48  # of a document that prompts are cut from
# Where in a document prompts end, as shares of its lines: at most so many are cut from one.
CUTS = tuple(number / 24 for number in range(1, 24))
LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "English": ("en",),
    "Latin letters": ("de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "sw", "vi"),
    "Cyrillic": ("ru", "uk"),
    "Chinese, Japanese": ("zh", "ja"),
    "Korean, Hindi": ("ko", "hi"),
}
# What a reader can judge: each begins something that Python's own files are full of.
READABLE = (
    'def read_lines(path):\n    """',
    'class Stack:\n    """A stack of items."""\n\n    def __init__(self',
    '"""Support for reading and writing',
    "    if not isinstance(value, str):\n        raise",
    "import argparse\n\n\ndef main():\n    parser = argparse",
    "try:\n    import json\nexcept",
    '    def close(self):\n        """Close the',
    "# Return the number of",
)


def held_out(model: Path = MODEL) -> Mapping[str, str]:
    """The held-out documents that ship with a checkpoint: path -> text."""
    lines = (model / TEXT).read_text(encoding="utf-8").split("\n")
    return {entry["path"]: entry["text"] for entry in map(json.loads, filter(None, lines))}


def code_prompts(count: int, lines: int = PROMPT_LINES, model: Path = MODEL) -> list[str]:
    """At most so many lines of held-out Python each; alike many prompts of every document that is long enough.

    Raises ValueError for more than the text makes.
    """
    cut = [list(_prompts_of(text, lines)) for path, text in held_out(model).items() if path.endswith(".py")]
    found = [prompt for prompt in itertools.chain(*itertools.zip_longest(*cut)) if prompt]
    if len(found) < count:
        raise ValueError(f"the held-out text makes {len(found)} prompts, fewer than {count}")
    return found[:count]


def _prompts_of(text: str, size: int) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    for share in CUTS if len(lines) > LEAST_LINES else ():
        last = int(share * len(lines))
        prompt = "".join(lines[max(0, last - size) : last])
        if prompt.strip() and len(prompt) <= PIECE_CHARACTERS:
            yield prompt


def kinds(model: Path = MODEL) -> dict[str, list[str]]:
    """Texts by kind, in pieces that are short enough for any context of a thousand tokens."""
    codes, prose = zip(*map(_parted, held_out(model).items()), strict=True)
    found = {"code": _pieces("".join(codes)), "docstrings": _pieces("".join(prose))}
    bodies = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    for kind, languages in LANGUAGES.items():
        chosen = (entry["body"] for entry in bodies if entry["custom_id"].split("-")[0] in languages)
        found[kind] = _some([body["prompt"] for body in chosen if "prompt" in body])
    return found


def _parted(document: tuple[str, str]) -> tuple[str, str]:
    """A document's code without docstrings and comments, and its docstrings."""
    path, text = document
    if not path.endswith(".py"):
        return "", text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text's own affair
        tree = ast.parse(text)
    described = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    prose = [told for node in described if (told := ast.get_docstring(node))]
    for node in described:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n", "".join(f"{told}\n\n" for told in prose)


def _pieces(text: str) -> list[str]:
    return _some([text[first : first + PIECE_CHARACTERS] for first in range(0, len(text), PIECE_CHARACTERS)])


def _some(pieces: list[str]) -> list[str]:
    """From all over a text, alike far from each other."""
    return pieces[:: max(1, -(-len(pieces) // KIND_PIECES))]


def job(prompts: Sequence[str]) -> str:
    """A batch file: the readable beginnings, then the others; most greedy, every third sampled under a seed."""
    lines = []
    for number, prompt in enumerate((*READABLE, *prompts)):
        readable = number < len(READABLE)
        body = {"prompt": prompt, "max_tokens": 56 if readable else 8 + 8 * (number % 5), "temperature": 0.0}
        if number % 3 == 2 and not readable:
            body |= {"temperature": 0.8, "top_p": 0.95, "seed": number}
        name = f"{'readable' if readable else 'held-out'}-{number:03}"
        lines.append({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
