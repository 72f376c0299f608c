"""What transformers answers: ids, texts, logits and greedy answers, in float64, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy ids without their prompt, and the log-probability of each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Reference:
    """One checkpoint in transformers."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        # Its own choice of attention: sdpa, and eager for what sdpa cannot compute. Only eager experts have a float64.
        load = AutoModelForCausalLM.from_pretrained
        self._model = load(directory, dtype=torch.float64, experts_implementation="eager").eval()

        self.end_id = int(self.tokenizer.eos_token_id)

    def ids(self, text: str) -> tuple[int, ...]:
        """Of a prompt, its begin token included."""
        return tuple(self.tokenizer(text)["input_ids"])

    def plain_ids(self, text: str) -> tuple[int, ...]:
        """Of a piece of text, and of nothing around it."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """After each id, [ids, vocabulary], in one pass."""
        return np.asarray(self._model(torch.tensor([list(ids)])).logits[0].numpy(), np.float64)

    def logprobs(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """The same as log-probabilities."""
        logits = self.logits(ids)
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))

    @torch.no_grad()
    def greedy(self, text: str, steps: int) -> Answer:
        """The likeliest next id, `steps` times; end ids do not end it."""
        ids = list(self.tokenizer(text)["input_ids"])
        prompt = len(ids)
        logprobs: list[float] = []
        cache = None
        fed = torch.tensor([ids])
        for _ in range(steps):
            output = self._model(fed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            row = output.logits[0, -1].log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
            fed = torch.tensor([[ids[-1]]])
        return Answer(tuple(ids[prompt:]), tuple(logprobs))

    @torch.no_grad()
    def after_each(self, text: str, ids: Sequence[int]) -> Answer:
        """The likeliest id after each beginning of an answer, in one pass; the answer itself if it is greedy."""
        prompt = list(self.tokenizer(text)["input_ids"])
        rows = self._model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return Answer(tuple(rows.argmax(-1).tolist()), tuple(rows.max(-1).values.tolist()))
