"""The training loop: AdamW on a cosine, experts balanced after every step, and states from which it goes on.

Batches are drawn by seed and step alone, so a run that was interrupted sees the tokens it would have seen. How far it
is decides the learning rate: by steps if they are given, else by the seconds spent. It knows no text and no export.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.tiny.model import Losses, TinyModel
from examples.tiny.tokens import Ids

BATCH, PEAK_RATE = 128, 2e-3
SECOND_WEIGHT = 0.3  # of the loss of the token after the next; DeepSeek-V3, section 4.2
BALANCE_RATE = 0.001  # the same section
BALANCED_UNTIL = 0.95  # of the run; then corrections stand still
WARM_UP = 0.02
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
LOGGED_STEPS = 20
SAVED_S = 60.0
STATE = "state.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Of a run. steps: None trains for `seconds`. batch: sequences of a step, of the model's context."""

    seconds: float
    steps: int | None = None
    batch: int = BATCH
    peak_rate: float = PEAK_RATE
    seed: int = 0
    device: str = "cpu"
    compiles: bool = False


@dataclass(slots=True)
class Progress:
    """Where a run is. curve: step, and its two losses, every LOGGED_STEPS steps."""

    step: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def done(self, settings: Settings) -> float:
        """Of the run, 0 to 1."""
        part = self.seconds / settings.seconds if settings.steps is None else self.step / settings.steps
        return min(1.0, part)


def rate_at(done: float, peak: float) -> float:
    """Up in a straight line, then down to nothing along a cosine."""
    if done < WARM_UP:
        return peak * max(done, 0.01 * WARM_UP) / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


class Trainer:
    """Holds the model, its optimizer and the ids; `run` trains until the end, or from where a state was left."""

    def __init__(self, model: TinyModel, ids: Ids, settings: Settings, directory: Path) -> None:
        self.model, self.settings = model.to(settings.device), settings
        self.progress = Progress()
        self._ids = torch.from_numpy(ids.astype(np.int32)).to(settings.device)
        self._state = directory / STATE
        self._cuda = settings.device.startswith("cuda")
        self._losses: Callable[[Tensor], Losses] = model
        self._optimizer = _optimizer(model, settings, fused=self._cuda)
        if len(ids) <= model.shape.context + 2:
            raise ValueError(
                f"the text has {len(ids)} tokens, of which no window of {model.shape.context} + 2 is drawn"
            )
        if self._state.exists():
            self._restore()

    @property
    def tokens_seen(self) -> int:
        return self.progress.step * self.settings.batch * self.model.shape.context

    def run(self, told: Callable[[str], None], call_s: float = math.inf) -> Progress:
        """Trains to the end, or until this call has trained for call_s. told: is given a line now and then."""
        self.model.train()
        if self.settings.compiles:
            self._compile(told)
        saved = last = time.monotonic()
        until_s = self.progress.seconds + call_s
        while (done := self.progress.done(self.settings)) < 1 and self.progress.seconds < until_s:
            losses = self._step(done)
            self.progress.step += 1
            logs = self.progress.step % LOGGED_STEPS == 0
            if logs:
                entry = (self.progress.step, losses.next.item(), losses.second.item())
                self.progress.curve.append(entry)
                if not math.isfinite(entry[1]):
                    raise ArithmeticError(f"the loss of step {entry[0]} is {entry[1]}; lower the learning rate")
            now = time.monotonic()
            self.progress.seconds += now - last
            last = now
            if logs and self.progress.step % (10 * LOGGED_STEPS) == 0:
                told(self._line())
            if now - saved >= SAVED_S:
                self.save()
                saved = last = time.monotonic()
        self.save()
        return self.progress

    def save(self) -> None:
        """The whole state, in place of the last one at once."""
        progress = self.progress
        content = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "progress": (progress.step, progress.seconds, progress.curve),
        }
        begun = self._state.with_suffix(".part")
        torch.save(content, begun)
        begun.replace(self._state)

    def _restore(self) -> None:
        content: dict[str, Any] = torch.load(self._state, map_location=self.settings.device, weights_only=True)
        self.model.load_state_dict(content["model"])
        self._optimizer.load_state_dict(content["optimizer"])
        step, seconds, curve = content["progress"]
        self.progress = Progress(step, seconds, [tuple(entry) for entry in curve])

    def _step(self, done: float) -> Losses:
        rate = rate_at(done, self.settings.peak_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        losses = self._backward(self._batch())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if done < BALANCED_UNTIL:
            for mixture, choices in zip(self.model.mixtures, losses.choices, strict=True):
                mixture.balance(choices, BALANCE_RATE)
        return losses

    def _backward(self, tokens: Tensor) -> Losses:
        with torch.autocast(self._ids.device.type, torch.bfloat16, enabled=self._cuda):
            losses = self._losses(tokens)
        torch.autograd.backward(losses.next + SECOND_WEIGHT * losses.second)
        return losses

    def _batch(self) -> Tensor:
        """Windows [batch, context + 2] from anywhere in the text."""
        random = np.random.default_rng((self.settings.seed, self.progress.step))
        length = self.model.shape.context + 2
        starts = torch.from_numpy(random.integers(0, len(self._ids) - length, self.settings.batch)).to(self._ids.device)
        return self._ids[starts[:, None] + torch.arange(length, device=self._ids.device)].long()

    def _compile(self, told: Callable[[str], None]) -> None:
        """Let torch fuse the forward and the backward; where it cannot, say so and go on without."""
        start = time.monotonic()
        compiled: Callable[[Tensor], Losses] = torch.compile(self.model, dynamic=False)
        self._losses = compiled
        try:
            self._backward(self._batch())
        except RuntimeError as error:
            self._losses = self.model
            told(f"not compiled: {str(error).splitlines()[0]}")
        else:
            told(f"compiled in {time.monotonic() - start:.0f} s")
        self._optimizer.zero_grad(set_to_none=True)

    def _line(self) -> str:
        step, following, second = self.progress.curve[-1]
        speed = self.tokens_seen / self.progress.seconds
        return (
            f"step {step}  loss {following:.3f}  second {second:.3f}  {speed / 1e3:.0f}k tokens/s  "
            f"{100 * self.progress.done(self.settings):.0f} %"
        )


def _optimizer(model: TinyModel, settings: Settings, *, fused: bool) -> torch.optim.AdamW:
    """Matrices decay, norms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.peak_rate, betas=BETAS, fused=fused)
