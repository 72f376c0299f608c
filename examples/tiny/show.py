"""What the tiny model can show on a running cluster, told on a console: text, experts, drafts, perplexity.

The second half of `make demo`, for models with experts and a layer for multi-token prediction. Each part prints what it
has measured and returns it. It starts and ends nothing; to compare drafters it changes what the cluster serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from echelon.cli.experts.heat import colour, heats, letter
from echelon.cli.trace.drawing import to_png
from echelon.testing import LocalCluster
from echelon.types import ItemResult
from examples.tiny import measuring, specialists, texts
from examples.tiny.held_out import TEXT

READABLE_SHOWN = 5
DRAFTED_PROMPTS, DRAFTED_TOKENS = 8, 40
EVALUATED_DOCUMENTS = 6
LEAST_TOKENS_PER_STEP = 1.3
MOST_PERPLEXITY_ERROR = 1e-3
DRAFTERS = {
    "mtp": "the model's layer for multi-token prediction",
    "ngram": "n-grams of the text before",
    "off": "none",
}
PICTURE = "experts.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What was measured. differing: the share of choices by which the two kinds of text that differ most do."""

    differing: float
    drafts: Mapping[str, Mapping[str, object]]
    tokens_per_step: float
    identical: bool
    perplexity: float
    transformers_perplexity: float
    bits_per_byte: float

    def problems(self) -> list[str]:
        """What a trained model on an exact cluster must not show."""
        off = abs(self.perplexity / self.transformers_perplexity - 1)
        checks = {
            "answers with drafts are not those without": self.identical,
            f"{self.tokens_per_step:.2f} tokens a step with the model's own drafts, expected more than "
            f"{LEAST_TOKENS_PER_STEP}": self.tokens_per_step > LEAST_TOKENS_PER_STEP,
            f"the perplexity is {100 * off:.2f} % off transformers'": off < MOST_PERPLEXITY_ERROR,
        }
        return [problem for problem, fine in checks.items() if not fine]


def show(console: Console, cluster: LocalCluster, folder: Path) -> Shown:
    """All parts but the text, which the job has brought."""
    differing = show_experts(console, cluster, folder / PICTURE)
    decoded = show_drafts(console, cluster)
    perplexity, theirs, bits = show_perplexity(console, cluster)
    return Shown(
        differing=differing,
        drafts={drafter: answers.figures() for drafter, answers in decoded.items()},
        tokens_per_step=round(decoded["mtp"].tokens_per_step, 4),
        identical=len({answers.answers for answers in decoded.values()}) == 1,
        perplexity=perplexity,
        transformers_perplexity=theirs,
        bits_per_byte=bits,
    )


def show_text(console: Console, results: Sequence[ItemResult]) -> None:
    """The first answers of the job, in bold behind their prompts."""
    console.print(
        "\nWhat it writes, in bold (greedy; it was trained on Python and its documentation, and knows nothing):"
    )
    for prompt, item in list(zip(texts.READABLE, results, strict=False))[:READABLE_SHOWN]:
        console.print(Text.assemble("\n", prompt, (item.text or "", "bold")))
    console.print()


def show_experts(console: Console, cluster: LocalCluster, picture: Path) -> float:
    """How experts share the kinds of text, as a picture and as strips."""
    choices = measuring.loads_by_kind(cluster, texts.kinds())
    picture.write_bytes(to_png(specialists.draw_kinds(choices, "Which experts of the tiny model take which text")))
    console.print(f"Experts by kind of text, red: more than an even share, blue: less (as a picture: {picture}):")
    console.print(f"  {'layer':19}" + "".join(f"{layer:<10}" for layer in next(iter(choices.values()))))
    for kind, layers in choices.items():
        line = Text(f"  {kind:18} ")
        for rows in layers.values():
            for heat in heats(rows):
                red, green, blue = colour(heat)
                line.append(letter(heat), f"black on rgb({red},{green},{blue})")
            line.append("  ")
        console.print(line)
    one, other, share = specialists.farthest(choices)
    console.print(f"  {escape(one)} and {escape(other)} differ most: {100 * share:.0f} % of choices fall on others\n")
    return round(share, 4)


def show_drafts(console: Console, cluster: LocalCluster) -> dict[str, measuring.Decoded]:
    """Held-out code continued with each drafter."""
    prompts = texts.code_prompts(DRAFTED_PROMPTS)
    console.print(f"Drafts, for {DRAFTED_TOKENS} tokens behind each of {len(prompts)} beginnings of held-out code:")
    decoded: dict[str, measuring.Decoded] = {}
    for drafter, told in DRAFTERS.items():
        cluster.reconfigure(speculation=drafter)
        found = decoded[drafter] = measuring.decode(cluster, prompts, DRAFTED_TOKENS)
        share = (
            f"{found.accepted} of {found.drafted} accepted ({100 * found.acceptance:.0f} %), " if found.drafted else ""
        )
        console.print(f"  {told}: {share}{found.tokens_per_step:.2f} tokens a step")
    same = decoded["mtp"].answers == decoded["off"].answers == decoded["ngram"].answers
    console.print(f"  the tokens are {'the same each time' if same else '[red]NOT THE SAME[/]'}\n")
    return decoded


def show_perplexity(console: Console, cluster: LocalCluster) -> tuple[float, float, float]:
    """Perplexity by the cluster and by transformers, and the cluster's bits per byte."""
    console.print(f"echelon eval perplexity on {EVALUATED_DOCUMENTS} held-out documents, and transformers on the same:")
    file = texts.MODEL / TEXT
    found = measuring.evaluate(cluster.target, file, EVALUATED_DOCUMENTS)
    documents = list(texts.held_out().values())[:EVALUATED_DOCUMENTS]
    theirs = measuring.transformers_score(texts.MODEL, documents, torch.float64)
    console.print(
        f"  perplexity {found['perplexity']:.6f}, transformers' {theirs.perplexity:.6f};"
        f" {found['bits_per_byte']:.3f} bits a byte, {100 * found['accuracy']:.0f} % of next tokens foretold"
    )
    return found["perplexity"], theirs.perplexity, found["bits_per_byte"]
