"""Break one line of the production code after another, and see the simulation turn red.

Prints of each mutant the first seed that shows it and the promise that it breaks. Exit code 1 if one of them lives.
    python -m tests.simulation.mutants [NAME ...] [--seeds N]
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.mutants.all import MUTANTS
from tests.simulation.mutants.registry import SEEDS, promise, red_at


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="these alone")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many lives one may outlive")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - MUTANTS.keys():
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}; there are {', '.join(MUTANTS)}")
    names = arguments.names or list(MUTANTS)
    width, living, start_s = max(map(len, names)), 0, time.monotonic()
    sys.stdout.write(f"{'mutant':<{width}}  red at seed  promise\n")
    for name in names:
        seed = red_at(MUTANTS[name], arguments.seeds)
        living += seed is None
        sys.stdout.write(f"{name:<{width}}  {'LIVES' if seed is None else seed:>11}  {promise(MUTANTS[name])}\n")
        sys.stdout.flush()
    took_s = time.monotonic() - start_s
    sys.stdout.write(
        f"{len(names) - living} of {len(names)} mutants are red within {arguments.seeds} seeds; {took_s:.0f} s\n"
    )
    return 1 if living else 0


if __name__ == "__main__":
    sys.exit(main())
