"""Streams of a few requests, opened, read, left, resumed, cancelled and taken over in any order.

A state machine draws the steps. Whatever it does, each stream is whole or ends with one error, no two streams of a
request say different tokens, and in the end the cluster is as it was.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from echelon.v1 import generation_pb2
from tests.cluster.calls import METHODS, Answers, End, assert_proper, error_info, open_call
from tests.cluster.good_messages import VOCABULARY, samplings
from tests.cluster.target import Target

# What a client that comes back holds; the last three may make a request's answer another one, and spoil it for good.
HOW = ("nothing", *["shown"] * 6, *["part"] * 4, *["wrong"] * 3, "longer", "swapped", "more")
# Nothing that is drawn depends on what the cluster has said so far: places are taken modulo what there is.
PLACE, WHICH, MORE = st.integers(0, 3), st.integers(0, 59), st.lists(st.integers(0, 330), min_size=1, max_size=20)
MOSTLY = st.sampled_from((True,) * 5 + (False,))
PATIENT_S = 60.0  # only what hangs takes so long
MACHINES = itertools.count()
Held = tuple[tuple[int, ...], ...]


@dataclass(eq=False)
class Stream:
    """One call of StreamGenerate under way. exact: its client holds what was shown, and no other takes it over.

    wrong: its client holds what was never shown. first: it asks for what was first asked for under this id.
    """

    request_id: str
    call: Any
    received: Held
    timeout_s: float
    messages: list[Any] = field(default_factory=list)
    exact: bool = True
    wrong: bool = False
    first: bool = True

    @property
    def patient(self) -> bool:
        return self.timeout_s == PATIENT_S


class Streams(RuleBasedStateMachine):
    """Up to four requests, whatever number of streams."""

    def __init__(self, target: Target, ends: Counter[str]) -> None:
        super().__init__()
        self.target, self.ends = target, ends
        self.prefix = f"machine-{next(MACHINES)}"
        self.requests: dict[str, generation_pb2.GenerateRequest] = {}
        self.open: list[Stream] = []
        self.answers = Answers()
        self.meddled: set[str] = set()  # requests that may end otherwise than by themselves
        self.begun: set[str] = set()  # requests that the cluster has shown to be the ones first asked for

    @initialize(samplings=st.lists(samplings(), min_size=2, max_size=3), length=st.integers(12, 80))
    def begin(self, samplings: list[generation_pb2.SamplingParams], length: int) -> None:
        """Some requests, so that there is something to come back to."""
        for place, sampling in enumerate(samplings):
            self.start(place, sampling, length, patient=True, same=True)

    @rule(place=PLACE, sampling=samplings(), length=st.integers(12, 80), patient=MOSTLY, same=MOSTLY)
    def start(
        self, place: int, sampling: generation_pb2.SamplingParams, length: int, patient: bool, same: bool
    ) -> None:
        """A new request, or a known one once more, or another under its id."""
        request_id = f"{self.prefix}-{place}"
        sampling.seed, sampling.max_tokens = 7, length
        request = generation_pb2.GenerateRequest(text="Geese fly so", request_id=request_id, sampling=sampling)
        known = self.requests.setdefault(request_id, request)
        if not patient:
            self.meddled.add(request_id)
        self._open(known if same else request, (), PATIENT_S if patient else 0.05, exact=same)

    @rule(place=PLACE, how=st.sampled_from(HOW), choice=st.integers(0, 7), cut=st.integers(0, 80), more=MORE)
    def resume(self, place: int, how: str, choice: int, cut: int, more: list[int]) -> None:
        """With what was shown, with a part of it, with something else."""
        request_id = f"{self.prefix}-{place}"
        if request_id not in self.requests:
            return
        for stream in self.open:
            if stream.request_id == request_id and stream.messages:
                self._take(stream, None, left=True)  # as far as it was read
        held = [list(ids) for ids in self.answers.of(request_id)]
        ids = held[choice % len(held)] if held else []
        if how == "nothing":
            held = []
        elif how == "part":
            del ids[cut % (len(ids) + 1) :]
        elif how == "wrong" and ids:
            ids[cut % len(ids)] = (ids[cut % len(ids)] + 1 + more[0] % (VOCABULARY - 1)) % VOCABULARY
        elif how == "longer":
            ids.extend(more)
        elif how == "swapped":
            held = held[1:] + held[:1]
        elif how == "more":
            held += [[1]] * 20
        if how in ("longer", "swapped", "more"):
            self.answers.distrust(request_id)
            self.meddled.add(request_id)
        self.ends[f"resumed: {how}"] += 1
        exact, wrong = how in ("nothing", "shown", "part"), how == "wrong" and bool(ids)
        self._open(self.requests[request_id], tuple(map(tuple, held)), PATIENT_S, exact, wrong)

    def _open(
        self, request: generation_pb2.GenerateRequest, held: Held, timeout_s: float, exact: bool, wrong: bool = False
    ) -> None:
        rivals = [stream for stream in self.open if stream.request_id == request.request_id]
        first = request == self.requests[request.request_id]
        if first and not wrong:
            exact &= not rivals  # whichever the cluster hears last has it
            for stream in rivals:
                stream.exact = False
        elif not first and request.request_id not in self.begun:
            # Prompts are tokenized side by side, and who leaves meanwhile was never heard of: this may become the one.
            self.answers.distrust(request.request_id)
            self.meddled.add(request.request_id)
        message = generation_pb2.GenerateRequest()
        message.CopyFrom(request)
        message.resume.received.extend(generation_pb2.TokenIds(ids=ids) for ids in held)
        call = open_call(self.target.channel, METHODS["StreamGenerate"], message.SerializeToString(), timeout_s)
        stream = Stream(request.request_id, call, held, timeout_s, exact=exact, wrong=wrong, first=first)
        self.open.append(stream)

    @rule(which=WHICH, count=st.integers(1, 40))
    def read(self, which: int, count: int) -> None:
        if self.open:
            self._read(self.open[which % len(self.open)], count)

    @rule(which=WHICH)
    def finish(self, which: int) -> None:
        if self.open:
            self._read(self.open[which % len(self.open)], None)

    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        if self.open:
            stream = self.open[which % len(self.open)]
            stream.call.cancel()
            self._end(stream, None, left=True)

    @rule(places=st.lists(PLACE, min_size=1, max_size=3))
    def cancel(self, places: list[int]) -> None:
        request_ids = [f"{self.prefix}-{place}" for place in places]
        message = generation_pb2.CancelGenerationRequest(request_ids=request_ids)
        answer = self.target.ask("CancelGeneration", message.SerializeToString())
        assert isinstance(answer, generation_pb2.CancelGenerationResponse)
        assert set(answer.cancelled_request_ids) <= set(request_ids)
        self.meddled.update(answer.cancelled_request_ids)

    def _read(self, stream: Stream, count: int | None) -> None:
        """So many messages, or all."""
        try:
            for _ in range(count) if count else itertools.count():
                stream.messages.append(next(stream.call))
                if stream.first:
                    self.begun.add(stream.request_id)
        except StopIteration:
            self._end(stream, None)
        except grpc.RpcError as error:
            self._end(stream, error)

    def _end(self, stream: Stream, error: grpc.RpcError | None, left: bool = False) -> None:
        self.open.remove(stream)
        self._take(stream, error, left)
        if stream.exact and not left and stream.request_id not in self.meddled:
            assert error is None, error
            self.ends["undisturbed"] += 1
        info = error_info(error) if error else None
        assert info or not error or not stream.patient, f"only its own deadline ended it: {error}"
        if stream.wrong and not left and self.answers.trusts(stream.request_id):
            assert info and info.reason == "REQUEST_ID_CONFLICT", error
        if info and info.reason == "CONSTRAINT_FAILED":
            assert not self.answers.trusts(stream.request_id), error
        self.ends["left" if left else info.reason if info else "DEADLINE" if error else "OK"] += 1

    def _take(self, stream: Stream, error: grpc.RpcError | None, left: bool) -> None:
        end = End(METHODS["StreamGenerate"], tuple(stream.messages), error, left)
        assert_proper(end)
        if stream.messages:
            self.answers.take(end, stream.received)

    def teardown(self) -> None:
        for stream in list(self.open):
            self._read(stream, None)
        self.target.assert_undisturbed()


def fuzz_streams(target: Target, machines: int, steps: int) -> Counter[str]:
    ends: Counter[str] = Counter()
    config = settings(
        max_examples=machines,
        stateful_step_count=steps,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # to shrink what hangs would take hours
    )
    run_state_machine_as_test(lambda: Streams(target, ends), settings=config)  # type: ignore[arg-type]
    return ends
