"""The soak's criterion: noise, peaks and a warm-up are flat, what creeps is not."""

from __future__ import annotations

import random

import pytest

from benchmarks.soak import BOUNDS, LIMITS, judge, theil_sen


def series(slope: float, noise: float = 0.0, seconds: int = 120, start: float = 160.0) -> list[tuple[float, float]]:
    draw = random.Random(1)
    return [(float(x), start + slope * x + draw.uniform(-noise, noise)) for x in range(seconds)]


def test_the_slope_is_that_of_the_line_whatever_a_third_of_the_samples_say() -> None:
    samples = series(0.5)
    for place in range(0, len(samples), 3):
        samples[place] = (samples[place][0], 10_000.0)
    assert theil_sen(samples) == pytest.approx(0.5)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_what_creeps_grows_and_noise_does_not(noise: float) -> None:
    """Eight MiB over the judged four fifths of two minutes, and none."""
    assert not judge("coordinator.rss_mib", series(8 / 96, noise)).flat
    assert judge("coordinator.rss_mib", series(0.0, noise)).flat


def test_a_warm_up_and_peaks_are_flat() -> None:
    samples = series(0.0)
    samples[:20] = [(float(x), 100.0 + 3 * x) for x in range(20)]
    for place in (50, 70, 90, 110):
        samples[place] = (samples[place][0], 900.0)
    row = judge("coordinator.fds", samples)
    assert row.flat and (row.first, row.median) == (100.0, 160.0)


@pytest.mark.parametrize("figure", [*LIMITS, *BOUNDS])
def test_every_figure_that_is_watched_can_fail(figure: str) -> None:
    assert not judge(f"coordinator.{figure}", series(10_000_000.0)).flat
