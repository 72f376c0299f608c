"""A short soak: cancels, disconnects, deadlines and jobs by the thousand, and nothing grows or is left over."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import run, table
from tests.tiny import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]

BEHAVIOURS = {"cancelled", "disconnected", "job item", "late", "refused", "resumed", "taken over", "unary", "whole"}


def test_nothing_grows_under_two_thousand_requests(ray_address: str, tmp_path: Path) -> None:
    result = run(make_checkpoint(tmp_path / "tiny"), requests=2000, concurrency=16, ray_address=ray_address)
    assert result.left_over == {}
    assert all(row.flat for row in result.rows), f"\n{table(result.rows)}"
    assert {row.name.partition(".")[0] for row in result.rows} == {"coordinator", "supervisor", "rank", "replica"}
    assert {end.partition(":")[0] for end in result.ends} == BEHAVIOURS
    assert sum(result.ends.values()) == 2000
    for end in ("cancelled: CANCELLED", "late: DEADLINE_EXCEEDED", "taken over: ABORTED", "refused: INVALID_ARGUMENT"):
        assert result.ends[end]
