"""From text to token ids: the tiny model's tokenizer, and documents as one array with begin and end tokens.

The tokenizer is a byte-level BPE, as `make_checkpoint.py` makes them, so that any bytes can be told. It knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from examples.make_checkpoint import BEGIN, CHAT_TEMPLATE, END, train_tokenizer, write_json
from examples.tiny.sources import Document

LEARNT_BYTES = 64 << 20  # of text that merges are counted in
BATCH_DOCUMENTS = 512
MOST_VOCABULARY = 1 << 16  # ids are kept in 16 bits

Ids = npt.NDArray[np.uint16]


def learn_tokenizer(documents: Sequence[Document], vocabulary: int) -> Tokenizer:
    """From the first documents, which are in the order of their digests: a sample. Raises ValueError if they have too
    little text for the vocabulary."""
    if vocabulary > MOST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocabulary} is over {MOST_VOCABULARY}")
    tokenizer = train_tokenizer(_first(documents, LEARNT_BYTES), vocabulary)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the text has {tokenizer.get_vocab_size()} of the {vocabulary} tokens: give more text")
    return tokenizer


def _first(documents: Sequence[Document], text_bytes: int) -> Iterator[str]:
    for document in documents:
        if text_bytes <= 0:
            return
        yield document.text
        text_bytes -= len(document.text.encode())


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Ids]:
    """The ids of each document, begin token first, end token last."""
    end = tokenizer.token_to_id(END)
    found: list[Ids] = []
    for first in range(0, len(documents), BATCH_DOCUMENTS):
        texts = [document.text for document in documents[first : first + BATCH_DOCUMENTS]]
        found += [np.array([*encoding.ids, end], np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]
    return found


def write_tokenizer(tokenizer: Tokenizer, directory: Path, context: int) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
