"""The nouns between coordinator and leader survive the wire, in every optional form."""

from __future__ import annotations

import pytest

from echelon.internal import link, wire
from echelon.internal.v1 import link_pb2

FENCE = link.Fence(3, 1, 2**40)
SAMPLING = link.Sampling(0.5, 0.9, 40, 16, -(2**63), (2, 3), 5)
LOGPROB = link.Logprob(-0.5, (4, 5), (-0.5, -1.5))


@pytest.mark.parametrize("logprobs", [None, 0, 20])
def test_command(logprobs: int | None) -> None:
    sampling = link.Sampling(0.0, 1.0, 0, 16, 2**63 - 1, (), logprobs)
    command = link.Command(
        FENCE,
        9,
        (link.Assign("a", 1, (1, 2, 3), (), sampling), link.Assign("b", 2, (1,), (7, 8), SAMPLING)),
        (link.Abandon("c", 4),),
    )
    parsed = link_pb2.ReplicaCommand.FromString(wire.command_to_proto(command).SerializeToString())
    assert wire.command_from_proto(parsed) == command


@pytest.mark.parametrize("finish", [None, *link.Finish])
def test_report(finish: link.Finish | None) -> None:
    report = link.Report(
        FENCE,
        7,
        (link.TokenRun("a", 0, 1, 5, (10, 11), (LOGPROB, link.Logprob(-1.0)), finish), link.TokenRun("b", 0, 2, 0, ())),
        (link.Released("a", 1), link.Released("b", 2, "does not fit")),
        link.ReplicaHello(8, 100, 16, 512, (link.Running("a", 1, 5),)),
        link.ReplicaStats(77, 3, {"steps": 77}),
    )
    parsed = link_pb2.ReplicaReport.FromString(wire.report_to_proto(report).SerializeToString())
    assert wire.report_from_proto(parsed) == report


def test_what_a_report_leaves_out_stays_out() -> None:
    report = link.Report(FENCE, 1)
    assert wire.report_from_proto(wire.report_to_proto(report)) == report
    empty = link.Report(FENCE, 0, hello=link.ReplicaHello(0, 0, 0, 0), stats=link.ReplicaStats())
    assert wire.report_from_proto(wire.report_to_proto(empty)) == empty
