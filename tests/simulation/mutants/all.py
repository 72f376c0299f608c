"""All mutants by name, in the order of the system's parts: importing this module is what registers them.

Used by `python -m tests.simulation.mutants` and by the tests.
"""

from __future__ import annotations

from tests.simulation.mutants import engine, recovery, requests
from tests.simulation.mutants.registry import MUTANTS

PARTS = (requests, recovery, engine)

__all__ = ["MUTANTS", "PARTS"]
