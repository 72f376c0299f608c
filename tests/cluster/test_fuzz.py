"""Any bytes to any RPC: one proper end by the deadline, and the cluster is afterwards as it was before.

Messages are made from the descriptors, nearly good ones beside wild ones, and their bytes are spoilt; calls are left
at random points. Judged by `calls.py`. After each example nothing runs, waits or holds a block, the processes are the
same, and a probe gets the same tokens. So too after streams in any order, which `stream_machine.py` draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from echelon.v1 import generation_pb2
from tests.cluster.calls import METHODS, Answers, End, assert_proper, call
from tests.cluster.good_messages import FOUND, GOOD, nearly_good
from tests.cluster.messages import anything, wire
from tests.cluster.stream_machine import fuzz_streams
from tests.cluster.target import SETTLE_S, Target, fuzz_target

pytestmark = pytest.mark.cluster

EXAMPLES = {"Generate": 120, "StreamGenerate": 120, "CreateBatchJob": 60}  # of others 30
LONG_TIMES = 12


@pytest.fixture(scope="module")
def target(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    yield from fuzz_target(ray_address, tmp_path_factory.mktemp("fuzz"))


def fuzz(target: Target, name: str, examples: int) -> Counter[str]:
    """How often calls met each end."""
    method, ends = METHODS[name], Counter[str]()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(
        payload=wire(GOOD[name] | nearly_good(name) | nearly_good(name) | anything(method.request.DESCRIPTOR)),
        timeout_s=st.sampled_from((0.02, 1.0, 1.0, 1.0)),
        leave_after=st.sampled_from((None, None, None, None, 0, 1, 2, 4)),
    )
    def one(payload: bytes, timeout_s: float, leave_after: int | None) -> None:
        end = call(target.channel, method, payload, timeout_s, leave_after)
        try:
            method.request.FromString(payload)
        except DecodeError:
            assert_undecodable(end)
        else:
            assert_proper(end)
            if name == "StreamGenerate":
                message = generation_pb2.GenerateRequest.FromString(payload)
                Answers().take(end, tuple(tuple(held.ids) for held in message.resume.received))
        ends["left" if end.left else end.error.code().name if end.error else "OK"] += 1
        target.assert_undisturbed()

    one()
    return ends


def assert_undecodable(end: End) -> None:
    assert end.left or end.error is not None
    if end.error is not None:
        assert end.error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED), end.error


def test_every_method_has_good_messages() -> None:
    assert GOOD.keys() == METHODS.keys()


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_found(target: Target, name: str) -> None:
    method, message = FOUND[name]
    end = call(target.channel, METHODS[method], message.SerializeToString(), SETTLE_S)
    assert_proper(end)
    assert end.error is None or end.error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
    target.assert_undisturbed()


QUICK = ("Generate", "StreamGenerate", "CreateBatchJob", "Tokenize", "CancelGeneration")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in METHODS]
)
def test_any_message(target: Target, name: str) -> None:
    ends = fuzz(target, name, EXAMPLES.get(name, 30))
    assert ends["OK"] and (ends["INVALID_ARGUMENT"] or name not in EXAMPLES)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", METHODS)
def test_very_many_messages(target: Target, name: str) -> None:
    assert fuzz(target, name, EXAMPLES.get(name, 30) * LONG_TIMES)["OK"]


def test_streams_in_any_order(target: Target) -> None:
    ends = fuzz_streams(target, machines=30, steps=20)
    assert ends.keys() >= {"OK", "left", "undisturbed"}  # the rarer ends depend on who is quicker: see the long run


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_very_many_streams_in_any_order(target: Target) -> None:
    fuzz_streams(target, machines=600, steps=40)
