"""Problems of decode for benchmarks/kernels.py: attention, experts of few rows, and rows; served ones and odd ones."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.kernel_problems import (
    PLAIN,
    QWEN3_8B,
    QWEN3_EXPERTS,
    V2_LITE,
    V2_LITE_EXPERTS,
    V3,
    Heads,
    Maker,
    Problem,
    Sizes,
)
from models.attention_rule import AttentionRule


def served(maker: Maker, family: str) -> Iterator[Problem]:
    """With what is tried for them."""
    from benchmarks.kernel_choices import DOWNS, GATE_UPS, HEADS, LATENT, MANY_HEADS
    from benchmarks.router_problems import routers

    small = maker.divided
    if family == "heads":
        for rows, context in ((256, 1152), (64, 4096), (1, 4096)):
            name = f"32/8 heads of 128, {rows} x {context}"
            yield maker.attention(name, [max(1, context // small)] * max(1, rows // small), QWEN3_8B, choices=HEADS)
        mixed = [64 + 31 * (row * 37 % 64) for row in range(256 // small)]
        yield maker.attention("32/8 heads of 128, 256 x 64 to 2,017", mixed, QWEN3_8B, choices=HEADS)
    elif family == "latent":
        for rows, context in ((256, 4096), (256, 1152), (1, 4096)):
            name = f"latent, 16 heads, {rows} x {context}"
            yield maker.attention(name, [max(1, context // small)] * max(1, rows // small), V2_LITE, choices=LATENT)
        many = [max(1, 4096 // small)] * max(1, 64 // small)
        yield maker.attention("latent, 128 heads, 64 x 4096", many, V3, choices=MANY_HEADS)
    elif family == "experts":
        tried = [{"first": first} for first in GATE_UPS] + [{"second": second} for second in DOWNS]
        for title, sizes in (("V2-Lite", V2_LITE_EXPERTS), ("Qwen3-30B", QWEN3_EXPERTS)):
            scaled = Sizes(sizes.hidden // small, sizes.neurons // small, sizes.slots, sizes.chosen)
            for rows in (1, 16, 64, 256, 512):
                yield maker.experts(f"experts of {title}, {rows} rows", rows, scaled, choices=tried)
    else:
        for rows, chosen, slots in ((1, 6, 64), (64, 6, 64), (256, 8, 128)):
            yield maker.sorting(f"choices {rows} x {chosen} of {slots}", rows, chosen, slots)
        for rows in (1, 64, 256, 8192 // small):
            yield from routers(maker, rows)
        for rows in (1, 64, 256):
            yield maker.largest(f"largest of 151936, {rows} rows", rows, 151936 // small)
            yield maker.norm(f"norm, {rows} x 4096", rows, 4096)
            yield maker.norm(f"norm, {rows} x 32 x 128", rows, 32, 128)
            yield maker.rotation(f"rotation, {rows} x 32 x 128", rows, 32, 128, interleaved=False)


def odd(maker: Maker, family: str) -> Iterator[Problem]:
    """To be checked alone."""
    lengths = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 300, 1025]
    if family == "heads":
        narrow, uneven = (Heads(4, 2, 8, 8), Heads(28, 4, 80, 80)), (Heads(4, 4, 192, 128), Heads(6, 2, 24, 40))
        wide = (Heads(12, 4, 96, 96), Heads(3, 3, 64, 64), Heads(40, 2, 128, 128), Heads(8, 4, 256, 256))
        for heads in (*narrow, *wide, *uneven):
            for rule in (PLAIN, AttentionRule(100, 0.1, 30.0), AttentionRule(1, 0.1, None)):
                yield maker.attention(f"{heads} {rule}", lengths, heads, rule)
        yield maker.attention("long ones beside short", [1, 5000, 2], QWEN3_8B)
    elif family == "latent":
        for heads in (V2_LITE, V3, Heads(20, 1, 576, 512, True), Heads(5, 1, 72, 64, True), Heads(8, 1, 12, 8, True)):
            for rule in (PLAIN, AttentionRule(100, 0.05, 30.0)):
                yield maker.attention(f"{heads} {rule}", lengths, heads, rule)
    elif family == "experts":
        for sizes in (Sizes(200, 104, 7, 3), Sizes(256, 64, 1, 1), Sizes(64, 72, 130, 4)):
            for rows in (1, 5, 150):
                yield maker.experts(f"{sizes} {rows} rows", rows, sizes)
                yield maker.experts(f"{sizes} {rows} rows, some elsewhere", rows, sizes, elsewhere=5)
    else:
        for rows, chosen, slots in ((1, 1, 1), (3, 2, 5), (999, 5, 200)):
            yield maker.sorting(f"choices {rows} x {chosen} of {slots}", rows, chosen, slots)
        yield maker.largest("largest of many, 7 rows", 7, 100003 // maker.divided)
        yield maker.norm("norm, 3 x 5 x 90", 3, 5, 90)
        yield maker.norm("norm, 3 x 5 x 90, a part of wider rows", 3, 5, 90, part=True)
        yield maker.rotation("rotation of neighbours, 7 x 3 x 66", 7, 3, 66, interleaved=True)
