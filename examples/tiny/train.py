"""Trains the tiny model, measures it on held-out text, and writes its checkpoint, card and loss curve.

    python -m examples.tiny.corpus corpus.jsonl.xz
    python -m examples.tiny.train --corpus corpus.jsonl.xz --output .tiny --minutes 16

The same command goes on where an earlier one ended: killed, or after --pause-after minutes. Tokenizer, ids and state
are kept in OUTPUT/work, what is to be shipped in OUTPUT/model.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from echelon.cli.trace.drawing import Picture, to_png
from echelon.evaluation import longest_window
from examples.tiny.card import model_card, report_json
from examples.tiny.corpus import Corpus, read_corpus
from examples.tiny.curve import draw_curve
from examples.tiny.evaluate import compressed_bits_per_byte, expert_load, score
from examples.tiny.export import round_weights, write_model
from examples.tiny.model import TinyModel
from examples.tiny.shape import Shape
from examples.tiny.tokens import Ids, encode, learn_tokenizer
from examples.tiny.training import BATCH, PEAK_RATE, Settings, Trainer

START = time.monotonic()
SHAPES = {
    "full": Shape(),
    # For tests and machines without a GPU.
    "small": Shape(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        layers=3,
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        moe_intermediate_size=16,
        context=128,
    ),
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A corpus as ids. folder: for what a run keeps. training: all documents one after another; held_out: each."""

    corpus: Corpus
    folder: Path
    tokenizer: Tokenizer
    training: Ids
    held_out: list[Ids]


def say(line: str) -> None:
    """With the seconds since the start."""
    print(f"{time.monotonic() - START:7.1f} s  {line}", flush=True)


def prepare(options: argparse.Namespace) -> Prepared:
    """Reads a corpus, and learns its tokenizer or takes the one that was learnt before."""
    corpus, vocabulary = read_corpus(options.corpus), SHAPES[options.shape].vocab_size
    folder: Path = options.output / "work" / f"{corpus.manifest['digest'][:12]}-{options.shape}"
    folder.mkdir(parents=True, exist_ok=True)
    learnt, ids = folder / "tokenizer.json", folder / "ids.npy"
    if not learnt.exists():
        tokenizer = learn_tokenizer(corpus.training, vocabulary)
        np.save(ids, np.concatenate(encode(tokenizer, corpus.training)))
        tokenizer.save(str(learnt))
    tokenizer = Tokenizer.from_file(str(learnt))
    return Prepared(corpus, folder, tokenizer, np.load(ids), encode(tokenizer, corpus.held_out))


def train(options: argparse.Namespace) -> Mapping[str, Any] | None:
    """The report; None for a run that paused."""
    to_png(Picture(1, 1, ()))  # what is missing for it is told now, not when all is done
    shape, prepared = SHAPES[options.shape], prepare(options)
    say(f"{len(prepared.training):,} tokens to train on, {sum(map(len, prepared.held_out)):,} held out")
    settings = Settings(
        seconds=60 * options.minutes,
        steps=options.steps,
        batch=options.batch,
        peak_rate=options.rate,
        seed=options.seed,
        device=options.device,
        compiles=options.compile and options.device.startswith("cuda"),
    )
    model = TinyModel(shape)
    model.initialise(options.seed)
    trainer = Trainer(model, prepared.training, settings, prepared.folder)
    say(f"{shape.parameters:,} parameters; begins at step {trainer.progress.step:,}")
    trainer.run(say, 60 * options.pause_after)
    if trainer.progress.done(settings) < 1:
        say(f"paused at {100 * trainer.progress.done(settings):.0f} %; the same command goes on from here")
        return None
    round_weights(model)
    report = measure(trainer, prepared)
    write(options.output / "model", trainer, prepared, report)
    return report


def measure(trainer: Trainer, prepared: Prepared) -> dict[str, Any]:
    """All figures of a trained model."""
    model, settings, progress = trainer.model, trainer.settings, trainer.progress
    say("measuring on held-out text")
    held_out = prepared.corpus.held_out
    total, drafts = score(model, held_out, prepared.held_out)
    gzipped, xzipped = compressed_bits_per_byte(held_out)
    load = expert_load(model, prepared.held_out)
    window = longest_window(model.shape.context)
    cuda = settings.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "precision": "bfloat16 autocast over float32 weights" if cuda else "float32",
        "minutes": progress.seconds / 60,
        "steps": progress.step,
        "batch": settings.batch,
        "context": model.shape.context,
        "peak_rate": settings.peak_rate,
        "tokens_seen": trainer.tokens_seen,
        "tokens_per_s": trainer.tokens_seen / progress.seconds,
        "epochs": trainer.tokens_seen / len(prepared.training),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "training_loss": progress.curve[-1][1] if progress.curve else None,
        "held_out_documents": total.documents,
        "held_out_bytes": total.text_bytes,
        "held_out_tokens": total.scored,
        "window": window,
        "stride": window // 2,
        "held_out_loss": total.nats_per_token,
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte,
        "accuracy": total.accuracy,
        "gzip_bits_per_byte": gzipped,
        "xz_bits_per_byte": xzipped,
        "drafts_accepted": drafts.accepted / drafts.drafted,
        "expert_load": load,
        "expert_max_over_mean": max(max(layer) for layer in load),
    }


def write(folder: Path, trainer: Trainer, prepared: Prepared, report: dict[str, Any]) -> None:
    """What is shipped: checkpoint, card, curve, figures."""
    model = trainer.model
    report["checkpoint_bytes"] = write_model(model, prepared.tokenizer, folder)
    (folder / "README.md").write_text(model_card(model.shape, prepared.corpus.manifest, report), encoding="utf-8")
    (folder / "report.json").write_text(report_json(report), encoding="utf-8")
    if trainer.progress.curve:
        (folder / "loss.png").write_bytes(to_png(draw_curve(trainer.progress.curve, report["held_out_loss"])))


def show(report: Mapping[str, Any]) -> None:
    """The figures that decide whether it was worth it, one a line."""
    rows: dict[str, Callable[[Any], str]] = {
        **dict.fromkeys(("device", "steps", "tokens_seen", "held_out_tokens", "checkpoint_bytes"), str),
        **dict.fromkeys(("minutes", "epochs"), lambda value: f"{value:.1f}"),
        **dict.fromkeys(("tokens_per_s", "peak_memory_bytes"), lambda value: f"{value:,.0f}"),
        **dict.fromkeys(("training_loss", "held_out_loss", "perplexity"), lambda value: f"{value or 0:.4f}"),
        **dict.fromkeys(("bits_per_byte", "xz_bits_per_byte", "gzip_bits_per_byte"), lambda value: f"{value:.4f}"),
        **dict.fromkeys(("accuracy", "drafts_accepted", "expert_max_over_mean"), lambda value: f"{value:.4f}"),
    }
    for name, text in rows.items():
        print(f"{name:22} {text(report[name])}")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--corpus", type=Path, required=True, help="what examples.tiny.corpus wrote")
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--minutes", type=float, default=16.0, help="of training, over all calls")
    made.add_argument(
        "--pause-after", type=float, default=math.inf, help="minutes of this call's training; then it saves its state"
    )
    made.add_argument("--steps", type=int, help="train so many instead")
    made.add_argument("--batch", type=int, default=BATCH, help="sequences of a step")
    made.add_argument("--rate", type=float, default=PEAK_RATE, help="learning rate at its peak")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--shape", choices=sorted(SHAPES), default="full")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="let torch fuse kernels")
    return made


def main() -> None:
    """Reads the command line."""
    torch.set_float32_matmul_precision("highest")  # what is measured is float32; training is autocast anyway
    report = train(parser().parse_args())
    if report is not None:
        show(report)


if __name__ == "__main__":
    main()
