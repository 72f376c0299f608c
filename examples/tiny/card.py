"""The model card of a tiny model, from what its corpus's manifest and its report say.

Only numbers that were measured stand in it. It knows no model.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from examples.tiny.shape import Shape

WIDTH = 120
FRONT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en, code]
---
"""
USES = """## What it is for
It shows what random weights cannot: text that can be read, experts that differ, drafts that are accepted, and what a
lossy technique costs. `echelon serve` serves it, and `echelon eval perplexity` measures it on its held-out text.

## What it is not for
Anything else. It writes what looks like Python and is not: it knows no facts and follows no instructions, and what it
says may be wrong, or be a line that it has read. Do not run the code that it writes.
"""
PREDICTION = """The layer for multi-token prediction lies behind the last layer under DeepSeek's names (`enorm`,
`hnorm`, `eh_proj`, `shared_head.norm`). Its `embed_tokens` and `shared_head.head` are the model's own, and not written
twice.
"""
TEXT = """Source files and READMEs of the packages below, and of Python itself also the pages of its reference that
`help()` shows and the documentation strings of built-in modules; without vendored copies, tables of numbers, and files
of which much stands in others. {rule}: held out. Of the held-out text's longer lines {known:.0f} % occur somewhere in
the training text too. `examples/tiny/corpus.py` makes it; its digest is `{digest}`. `held_out.jsonl`, which
`examples/tiny/held_out.py` writes beside a model, has some of Python's own held-out documents, under
`LICENSE-PYTHON.txt`.
"""
LICENCES = """
The licences are those that the packages declare. The weights hold no file of them; where the model repeats a line, its
licence is that of the source.
"""
TRAINING = """{steps:,} steps of {batch} x {context} tokens, {millions:,.0f} million tokens in all, {epochs:.1f} times
the training text; AdamW at up to {peak_rate:g}, on a cosine; {tokens_per_s:,.0f} tokens/s; {precision}. Loss of the
next token and 0.3 of that of the one behind it, by `examples/tiny/train.py`.
"""
RESULTS = """{held_out_documents} documents, {held_out_bytes:,} bytes, in windows of {window} tokens, each but the first
{stride} further; in float32, with the weights as they are here.
"""


def model_card(shape: Shape, manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """README.md."""
    return "\n".join(
        [
            FRONT + "# Echelon's tiny model",
            filled(
                f"A DeepSeek-V3-style language model of {shape.parameters / 1e6:.2f} million parameters "
                f"({shape.active_parameters / 1e6:.2f} million for each token), trained in {report['minutes']:.1f} "
                f"minutes on {report['device']}."
            ),
            USES,
            "## Shape",
            _shape_table(shape),
            PREDICTION,
            "## Text",
            _text(manifest),
            "## Training",
            _training(report),
            "![loss](loss.png)\n",
            "## Held-out text",
            _results(report),
        ]
    )


def filled(text: str) -> str:
    """A paragraph in lines of the page's width."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _shape_table(shape: Shape) -> str:
    heads = f"{shape.num_attention_heads} heads of {shape.qk_nope_head_dim} + {shape.qk_rope_head_dim} numbers"
    ranks = f"ranks {shape.q_lora_rank} of queries, {shape.kv_lora_rank} of keys and values"
    experts = f"{shape.n_routed_experts} of {shape.moe_intermediate_size} neurons, {shape.num_experts_per_tok} a token"
    rows = [
        ("layers", f"{shape.layers}, the first {shape.first_k_dense_replace} dense; one more predicts a token further"),
        ("hidden size, vocabulary, context", f"{shape.hidden_size}, {shape.vocab_size}, {shape.context}"),
        ("latent attention", f"{heads}, values of {shape.v_head_dim}; {ranks}"),
        ("experts", f"{experts}, one shared; sigmoid router, balanced by a bias without a loss"),
        ("embedding and head", "one matrix"),
    ]
    return table(("what", "how much"), rows)


def _text(manifest: Mapping[str, Any]) -> str:
    training, held_out, none = manifest["training"], manifest["held_out"], {"documents": 0, "bytes": 0}
    rows = []
    for entry in manifest["sources"]:
        trained, kept = (side.get(entry["source"], none) for side in (training, held_out))
        sizes = (f"{trained['documents']:,}", f"{trained['bytes'] / 1e6:.2f}", f"{kept['bytes'] / 1e3:.0f}")
        rows.append((f"{entry['source']} {entry['version']}", entry["licence"], *sizes))
    known, digest = 100 * manifest["held_out_lines_known"], manifest["digest"][:16]
    text = filled(TEXT.format(rule=manifest["held_out_rule"], known=known, digest=digest))
    return text + "\n" + table(("source", "licence", "documents", "MB", "held out, kB"), rows) + LICENCES


def _training(report: Mapping[str, Any]) -> str:
    return filled(TRAINING.format(millions=report["tokens_seen"] / 1e6, **report))


def _results(report: Mapping[str, Any]) -> str:
    rows = [
        ("perplexity per token", f"{report['perplexity']:.3f}"),
        ("bits per byte", f"{report['bits_per_byte']:.3f}"),
        ("the same of xz -9e, gzip -9", f"{report['xz_bits_per_byte']:.3f}, {report['gzip_bits_per_byte']:.3f}"),
        ("next tokens that are the likeliest", f"{100 * report['accuracy']:.1f} %"),
        ("drafts of the next but one that the model agrees with", f"{100 * report['drafts_accepted']:.1f} %"),
        ("busiest expert over the mean, worst layer", f"{report['expert_max_over_mean']:.2f}"),
    ]
    return filled(RESULTS.format(**report)) + "\n" + table(("measure", "value"), rows)


def report_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=2) + "\n"
