"""Run simulated lives, or one again: python -m tests.simulation [--seed N] [--count M]."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.simulation.client import answered
from tests.simulation.run import Simulation


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many, from that seed on")
    arguments = parser.parse_args()
    totals: Counter[str] = Counter()
    start_s = time.monotonic()
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception:  # noqa: BLE001 any error at all is what we look for
            traceback.print_exc()
            sys.stderr.write(f"seed {seed}: run it again by: python -m tests.simulation --seed {seed}\n")
            return 1
        totals += simulation.happened + simulation.world.checker.told
        totals["requests"] += len(simulation.users)
        totals["jobs"] += len(simulation.jobs)
        totals["epochs"] += sum(site.epoch for site in simulation.sites)
        totals["answered"] += answered(simulation.users)
        totals["tokens"] += simulation.world.checker.tokens
        totals["terms"] += simulation.coordinator.term
    sys.stdout.write(f"{arguments.count} seeds in {time.monotonic() - start_s:.1f} s: {dict(totals)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
