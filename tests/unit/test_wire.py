"""The nouns between coordinator and leader survive the wire, in every optional form."""

from __future__ import annotations

import dataclasses

import pytest

from echelon.internal import link, wire
from echelon.internal.v1 import link_pb2

FENCE = link.Fence(3, 1, 2**40)
SAMPLING = link.Sampling(
    temperature=0.5,
    top_p=0.9,
    top_k=40,
    max_tokens=16,
    seed=-(2**63),
    stop_token_ids=(2, 3),
    logprobs=5,
    min_p=0.05,
    presence_penalty=-2.0,
    frequency_penalty=1.5,
    repetition_penalty=1.1,
    min_tokens=3,
    stop=("a", "\n\n"),
    include_stop=True,
    n=4,
    prompt_logprobs=0,
    logit_bias=((5, -100.0), (7, 0.5)),
    bad_words=((1, 2), (3,)),
    grammar='{"grammars": []}',
)
LOGPROB = link.Logprob(-0.5, (4, 5), (-0.5, -1.5))


def test_the_sampling_of_these_tests_sets_every_field() -> None:
    plain = link.Sampling(0.0, 1.0, 0, 1, 0)
    for field in dataclasses.fields(link.Sampling):
        assert getattr(SAMPLING, field.name) != getattr(plain, field.name), field.name


@pytest.mark.parametrize("logprobs", [None, 0, 20])
def test_command(logprobs: int | None) -> None:
    sampling = link.Sampling(0.0, 1.0, 0, 16, 2**63 - 1, (), logprobs)
    command = link.Command(
        FENCE,
        9,
        (
            link.Assign("a", 1, (1, 2, 3), (link.Progress(0),), sampling),
            link.Assign("b", 2, (1,), (link.Progress(0, (7, 8)), link.Progress(3)), SAMPLING, -(2**31), "tenant"),
        ),
        (link.Abandon("c", 4), link.Abandon("d", 1, 0), link.Abandon("d", 1, 2)),
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
        link.ReplicaHello(8, 100, 16, 512, (link.Running("a", 1),), 9),
        link.ReplicaStats(77, 3, {"steps": 77}, 5),
        (link.Prompted("a", 1, 32, (LOGPROB,)), link.Prompted("b", 2, 0)),
    )
    parsed = link_pb2.ReplicaReport.FromString(wire.report_to_proto(report).SerializeToString())
    assert wire.report_from_proto(parsed) == report


def test_what_a_report_leaves_out_stays_out() -> None:
    report = link.Report(FENCE, 1)
    assert wire.report_from_proto(wire.report_to_proto(report)) == report
    empty = link.Report(FENCE, 0, hello=link.ReplicaHello(0, 0, 0, 0), stats=link.ReplicaStats())
    assert wire.report_from_proto(wire.report_to_proto(empty)) == empty
