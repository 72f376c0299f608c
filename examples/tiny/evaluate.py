"""What a tiny model is worth on held-out text: perplexity, bits per byte beside gzip's and xz's, drafts, expert load.

On the device that trained it, in float32, over the windows that `echelon eval perplexity` asks a cluster for, so that
the figures compare. It knows no training and no file.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from echelon.evaluation import Score, Window, longest_window, windows
from examples.tiny.layers import rotation_of
from examples.tiny.model import TinyModel
from examples.tiny.sources import Document
from examples.tiny.tokens import Ids

BATCH_WINDOWS = 16


@dataclass(frozen=True, slots=True)
class Drafts:
    """How often the layer for multi-token prediction foretold what the model itself then held for likeliest, given the
    held-out text before both."""

    drafted: int
    accepted: int

    @property
    def tokens_per_step(self) -> float:
        """Of greedy decoding with one draft a step, were every text as this one."""
        return 1 + self.accepted / self.drafted


def score(model: TinyModel, documents: Sequence[Document], ids: Sequence[Ids]) -> tuple[Score, Drafts]:
    """Of all documents, each by itself; their end tokens are not scored, for they are no text."""
    model.eval()
    texts = Score(len(documents), sum(len(document.text.encode()) for document in documents))
    drafted = accepted = 0
    for rows, cut in _batches(ids, longest_window(model.shape.context)):
        with torch.inference_mode():
            following, second = model.both_logits(rows.to(model.embedding.weight.device))
        guesses, drafts = following.argmax(-1), second.argmax(-1)
        logprobs = F.log_softmax(following.double(), -1)
        for row, window in enumerate(cut):
            first, last = window.scored - window.first, window.last - window.first
            targets = rows[row, first:last].to(guesses.device)
            told = logprobs[row, first - 1 : last - 1].gather(-1, targets.unsqueeze(-1))
            hits = int((guesses[row, first - 1 : last - 1] == targets).sum())
            texts += Score(scored=last - first, nats=-float(told.sum()), correct=hits)
            drafted += last - first - 1
            accepted += int((drafts[row, first - 1 : last - 2] == guesses[row, first : last - 1]).sum())
    return texts, Drafts(drafted, accepted)


def _batches(ids: Sequence[Ids], longest: int) -> Iterator[tuple[Tensor, list[Window]]]:
    """Windows of all documents as rows, shorter ones padded behind, where causal attention does not look."""
    pieces = [
        (torch.from_numpy(document[window.first : window.last].astype("int64")), window)
        for document in (each[:-1] for each in ids)
        for window in windows(len(document), longest, longest // 2)
    ]
    pieces.sort(key=lambda piece: len(piece[0]))
    for start in range(0, len(pieces), BATCH_WINDOWS):
        group = pieces[start : start + BATCH_WINDOWS]
        yield torch.nn.utils.rnn.pad_sequence([piece for piece, _ in group], batch_first=True), [w for _, w in group]


def expert_load(model: TinyModel, ids: Sequence[Ids]) -> list[list[float]]:
    """How often each expert of each layer is chosen over held-out text, by layer; the mean is 1."""
    rotation = rotation_of(model.shape, model.shape.context, model.embedding.weight.device)
    total: Tensor | None = None
    for document in ids:
        rows = torch.from_numpy(document[: model.shape.context].astype("int64"))[None].to(rotation.device)
        with torch.inference_mode():
            chosen = torch.stack(model.hidden(rows, rotation[:, : rows.shape[1]])[1])
        total = chosen if total is None else total + chosen
    assert total is not None, "there is held-out text"
    shares: list[list[float]] = (total / total.mean(-1, keepdim=True)).tolist()
    return shares


def compressed_bits_per_byte(documents: Sequence[Document]) -> tuple[float, float]:
    """gzip -9 and xz -9e, on the text of all documents as one."""
    text = "".join(document.text for document in documents).encode()
    gzipped, xzipped = gzip.compress(text, 9, mtime=0), lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(gzipped) / len(text), 8 * len(xzipped) / len(text)
