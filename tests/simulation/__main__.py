"""Run simulated lives, or one again: python -m tests.simulation [--seed N] [--count M].

Prints what happened in them, which fault struck how often in which phase, and what has to be tried and was not.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.simulation.faults import FAULTS, IMPOSSIBLE
from tests.simulation.phases import Cell, table
from tests.simulation.run import MUST_HAPPEN, Simulation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many, from that seed on")
    arguments = parser.parse_args()
    totals: Counter[str] = Counter()
    hits: Counter[Cell] = Counter()
    start_s = time.monotonic()
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception:  # noqa: BLE001 any error at all is what we look for
            traceback.print_exc()
            sys.stderr.write(f"seed {seed}: run it again by: python -m tests.simulation --seed {seed}\n")
            return 1
        totals += simulation.coverage()
        hits += simulation.faults.hits
    lines = [f"{count:>9}  {name}\n" for name, count in sorted(totals.items())]
    missing = [f"    never  {name}\n" for name in MUST_HAPPEN if not totals[name]]
    sys.stdout.write("".join([*lines, "\n", table(hits, FAULTS, IMPOSSIBLE), "\n", *missing]))
    sys.stdout.write(f"{arguments.count} seeds in {time.monotonic() - start_s:.1f} s: every promise held\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
