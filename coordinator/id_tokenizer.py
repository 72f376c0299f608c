"""What stands in for a tokenizer where a model has none, as one of random weights may: texts are ids, as "17 204".

In the coordinator. Ids go through the same Rust code as any model's, so that detokenising costs what it does elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.tokenizer import Tokenizer
from echelon.errors import InvalidRequestError


class IdTokenizer(Tokenizer):
    """Of a vocabulary of so many ids."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        from tokenizers import Tokenizer as RustTokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast  # a second of imports, so only where a model is served

        rust = RustTokenizer(WordLevel({str(number): number for number in range(vocab_size)}))
        rust.pre_tokenizer = WhitespaceSplit()
        super().__init__(PreTrainedTokenizerFast(tokenizer_object=rust), directory)
        self._ids = frozenset(map(str, range(vocab_size)))

    def _encode(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        unknown = next((word for word in text.split() if word not in self._ids), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"{unknown!r} is no token: the model has no tokenizer.json, and its texts are ids from 0 to "
                f"{len(self._ids) - 1}, as '17 204'",
                field="text",
            )
        return super()._encode(text, special_tokens)
