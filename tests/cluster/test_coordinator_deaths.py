"""A coordinator killed at any point of anything's life, or stopped: ranks notice nothing, and no token is made twice.

Long: a supervisor gives up on a coordinator that dies five times within a minute, so the deaths are spread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.journal.codec import FRAME, frame, unframe
from coordinator.journal.state import Assigned, Record, Tokens
from echelon import Client, SamplingParams
from echelon.internal.v1 import journal_pb2
from echelon.testing import LocalCluster
from echelon.types import Completion
from tests.cluster.conftest import Case
from tests.cluster.reference import Reference
from tests.cluster.rules import said
from tests.cluster.streams import PROMPT, alive
from tests.cluster.test_interrupted import Call
from tests.cluster.test_restarts import ITEMS, assert_finished_undisturbed, submit
from tests.tiny import make_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.long]

STEPS = 200
LONG_PROMPT = f"{PROMPT}. " * 9  # many steps of MAX_STEP_TOKENS
MAX_STEP_TOKENS = 16
SAMPLINGS = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "seed": 5},
    "two": {"temperature": 0.8, "n": 2, "seed": 9, "logprobs": 0},
    "penalised": {"temperature": 0.0, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "stopped": {"temperature": 0.9, "seed": 3, "stop": ["never said"]},
}
GREEDY = SamplingParams(max_tokens=450, temperature=0.0, ignore_eos=True, logprobs=1)
DEATHS, WINDOW_S = 4, 61.0  # fewer than the supervisor suffers


@dataclass
class Told:
    """What a stream was shown, by choice."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)


def sampling_of(name: str) -> SamplingParams:
    return SamplingParams(max_tokens=STEPS, ignore_eos=True, **SAMPLINGS[name])  # type: ignore[arg-type]


def nothing(_: int) -> None:
    """Nobody wants to hear."""


def listen(
    client: Client,
    name: str,
    request_id: str,
    prompt: str,
    seen: Callable[[int], None] = nothing,
    cache_salt: str = "",
) -> Told:
    """A stream to its end; `seen` hears how many tokens of its first choice have come."""
    told = Told()
    for event in client.stream(prompt, sampling=sampling_of(name), request_id=request_id, cache_salt=cache_salt):
        ids = told.ids.setdefault(event.index, [])
        assert event.sequence == len(ids), "no token lost, doubled or reordered"
        ids.extend(event.token_ids)
        told.texts[event.index] = told.texts.get(event.index, "") + event.text
        told.logprobs.setdefault(event.index, []).extend(each.logprob for each in event.logprobs)
        if event.index == 0:
            seen(len(ids))
    return told


def started(pid: int) -> int:
    """When the process began, in ticks since the boot: another process under its number began at another time."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


class Deaths:
    """Kills the coordinator, not more often than its supervisor bears."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._times_s: deque[float] = deque(maxlen=DEATHS)

    def wait_turn(self) -> None:
        if len(self._times_s) == DEATHS:
            time.sleep(max(0.0, self._times_s[0] + WINDOW_S - time.monotonic()))

    def strike(self) -> None:
        self._cluster.kill("coordinator")
        self._times_s.append(time.monotonic())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("deaths") / "model")


@pytest.fixture(scope="module")
def case(model: Path, ray_address: str) -> Iterator[Case]:
    with LocalCluster(
        model, tensor=2, dtype="float64", ray_address=ray_address, max_step_tokens=MAX_STEP_TOKENS
    ) as cluster:
        yield Case("deaths", cluster, Reference(model))


@pytest.fixture(scope="module")
def deaths(case: Case) -> Deaths:
    return Deaths(case.cluster)


@pytest.fixture(scope="module")
def undisturbed(case: Case) -> dict[tuple[str, str], Completion]:
    client = case.cluster.client()
    kinds = [(name, text) for name in SAMPLINGS for text in (PROMPT, LONG_PROMPT)]
    with ThreadPoolExecutor(len(kinds)) as pool:
        answers = pool.map(lambda kind: client.generate(kind[1], sampling=sampling_of(kind[0])), kinds)
        return dict(zip(kinds, answers, strict=True))


POINTS = [("admission", delay_s) for delay_s in (0.0, 0.002, 0.01)]
POINTS += [("prefill", chunks) for chunks in (1, 3, 8)]
POINTS += [("decode", tokens) for tokens in (1, 2, 7, 20, 50, 90, 120, 150, 180)]
POINTS += [("end", tokens) for tokens in (STEPS - 2, STEPS - 1, STEPS)]


@pytest.mark.parametrize(("phase", "place"), POINTS)
def test_ranks_and_streams_notice_no_death(
    case: Case, deaths: Deaths, undisturbed: dict[tuple[str, str], Completion], phase: str, place: float
) -> None:
    cluster, client = case.cluster, case.cluster.client()
    deaths.wait_turn()
    before = cluster.status()
    starts = {rank.pid: started(rank.pid) for rank in before.ranks}
    prompt = LONG_PROMPT if phase == "prefill" else PROMPT
    due = threading.Event()

    def seen(tokens: int) -> None:
        if phase in ("decode", "end") and tokens >= place:
            due.set()

    def request_id(name: str) -> str:
        return f"{name}-{phase}-{place}-{before.term}"

    salt = f"{phase}-{place}"  # or the prompts would have been computed already
    with ThreadPoolExecutor(len(SAMPLINGS)) as pool:
        streams = {name: pool.submit(listen, client, name, request_id(name), prompt, seen, salt) for name in SAMPLINGS}
        strike_at(case, deaths, phase, place, due)
        told = {name: stream.result(timeout=120) for name, stream in streams.items()}
    after = cluster.wait(lambda now: now.term == before.term + 1, "the next coordinator")
    assert {rank.pid: started(rank.pid) for rank in after.ranks} == starts
    assert after.replicas[0].epoch == before.replicas[0].epoch
    for name in SAMPLINGS:
        expected = undisturbed[name, prompt]
        assert {each.index: list(each.token_ids) for each in expected.choices} == told[name].ids
        assert {each.index: each.text for each in expected.choices} == told[name].texts
        assert_close(told[name].logprobs, expected)
        again = client.generate(prompt, sampling=sampling_of(name), request_id=request_id(name), cache_salt=salt)
        assert {each.index: list(each.token_ids) for each in again.choices} == told[name].ids, (
            "it can be asked for again"
        )
        assert_close(logprobs_of(again), expected)  # which nobody could tell of tokens that only their client had held
        assert again.usage.recomputed_tokens == 0


def logprobs_of(answer: Completion) -> dict[int, list[float]]:
    return {choice.index: [each.logprob for each in choice.logprobs] for choice in answer.choices}


def assert_close(logprobs: dict[int, list[float]], expected: Completion) -> None:
    """Their last bits depend on the batch."""
    assert logprobs.keys() == logprobs_of(expected).keys()
    for choice, known in logprobs_of(expected).items():
        assert logprobs[choice] == pytest.approx(known, abs=1e-6)


def strike_at(case: Case, deaths: Deaths, phase: str, place: float, due: threading.Event) -> None:
    """At this place of the first stream that comes there."""
    if phase == "admission":
        case.cluster.wait(lambda now: now.queued + now.running > 0, "an admitted request")
        time.sleep(place)
    elif phase == "prefill":
        before = case.cluster.status().replicas[0].counters["prefill_chunks"]
        enough = before + int(place)
        case.cluster.wait(lambda now: now.replicas[0].counters["prefill_chunks"] >= enough, "chunks of the prompts")
    else:
        assert due.wait(60)
    deaths.strike()


def test_a_successor_tells_what_has_ended_and_goes_on_with_what_is_parked(
    case: Case, deaths: Deaths, undisturbed: dict[tuple[str, str], Completion]
) -> None:
    """To who comes back with nothing, or with the beginning; log-probabilities of two choices, too."""
    cluster, client, asked = case.cluster, case.cluster.client(), sampling_of("two")
    deaths.wait_turn()
    before = cluster.status()
    ended = client.generate(PROMPT, sampling=asked, request_id="ended")
    assert said(ended) == said(undisturbed["two", PROMPT])
    vanishing = Client(cluster.target)
    stream = vanishing.stream(PROMPT, sampling=asked, request_id="parked")
    for event in stream:
        if event.index == 1 and event.sequence >= 20:
            break
    vanishing.close()
    cluster.wait(lambda now: now.parked == 1 and now.running == 0, "a parked request")
    deaths.strike()
    cluster.wait(lambda now: now.term == before.term + 1 and now.parked == 1, "a successor that has it parked")
    again = client.generate(PROMPT, sampling=asked, request_id="ended")
    assert (again.choices, again.usage) == (ended.choices, ended.usage), "told again, to the last bit"
    told = listen(client, "two", "ended", PROMPT)
    held = [list(choice.token_ids) for choice in ended.choices]
    assert [told.ids[index] for index in range(2)] == held
    assert told.logprobs == logprobs_of(ended)
    fewer = [held[0][:7], held[1][:-1]]
    assert Call(cluster.target, asked, "ended", PROMPT).gather(fewer) == held, "the rest of it"
    resumed = client.generate(PROMPT, sampling=asked, request_id="parked")
    assert said(resumed) == said(ended)
    assert all(len(choice.logprobs) == STEPS for choice in resumed.choices)


@pytest.mark.parametrize("done", [1, ITEMS // 4])
def test_a_batch_job_notices_no_death(case: Case, deaths: Deaths, done: int) -> None:
    deaths.wait_turn()
    before = case.cluster.status()
    starts = {rank.pid: started(rank.pid) for rank in before.ranks}
    job = submit(case.cluster.client(), f"death-{done}")
    for status in job.watch(timeout_s=60.0):
        if status.counts.succeeded >= done:
            break
    deaths.strike()
    assert_finished_undisturbed(job, case.reference)
    after = case.cluster.status()
    assert after.term == before.term + 1
    assert {rank.pid: started(rank.pid) for rank in after.ranks} == starts
    assert all(result.completion and result.completion.usage.recomputed_tokens == 0 for result in job.results())


def terms(journal: Path) -> list[int]:
    """Of all records that are on the disk, in their order."""
    found: list[int] = []
    for path in sorted(journal.glob("*.log")):
        content, offset = path.read_bytes(), 0
        while offset < len(content):
            length, _ = FRAME.unpack_from(content, offset)
            payload = content[offset + FRAME.size : offset + FRAME.size + length]
            found.append(journal_pb2.JournalRecord.FromString(payload).term)
            offset += FRAME.size + length
    return found


def test_one_that_is_stopped_past_its_lease_and_replaced_writes_nothing_more(
    model: Path, ray_address: str, tmp_path: Path
) -> None:
    """Its ranks are ended with the lease; it is ended before its successor begins, and wakes no more."""
    state = tmp_path / "state"
    with LocalCluster(
        model, tensor=2, dtype="float64", ray_address=ray_address, state_dir=state, lease_s=5, heartbeat_s=0.5
    ) as cluster:
        before, client = cluster.status(), cluster.client()
        due, woken = threading.Event(), before.coordinator_pid
        expected = client.generate(PROMPT, sampling=sampling_of("sampled"))

        def seen(tokens: int) -> None:
            if tokens >= 20:
                due.set()

        with ThreadPoolExecutor(1) as pool:
            stream: Future[Told] = pool.submit(listen, client, "sampled", "stopped", PROMPT, seen)
            assert due.wait(60)
            cluster.stop("coordinator")
            after = cluster.wait_epoch(0, before.replicas[0].epoch + 1)
            cluster.resume(woken)
            told = stream.result(timeout=120)
        assert tuple(told.ids[0]) == expected.token_ids
        assert not alive(woken)
        assert after.term == before.term + 1
        assert not any(alive(rank.pid) for rank in before.ranks), "a lease that has ended ends its ranks"
        assert set(terms(state / "journal")) == {after.term}
        status = cluster.status()
        assert status.replicas[0].epoch == before.replicas[0].epoch + 1
        assert status.replicas[0].counters["refused_commands"] == 0
        assert status.journal == "durable"


def edit(journal: Path, request_id: str, token_id: int) -> list[int]:
    """Put another id in the place of the last one of a request's first choice; all its ids then."""
    (path,) = journal.glob("*.log")
    records, _ = unframe(path.read_bytes())
    last = max(
        place for place, each in enumerate(records) if isinstance(each, Tokens) and each.request_id == request_id
    )
    edited = records[last]
    assert isinstance(edited, Tokens)
    records[last] = Tokens(
        request_id, edited.attempt, edited.first_token, (*edited.ids[:-1], token_id), edited.logprobs, edited.choice
    )
    path.write_bytes(frame(records, 1) + b"\x30\x00\x00\x00torn")
    return ids_of(records, request_id)


def ids_of(records: list[Record], request_id: str) -> list[int]:
    ids: list[int] = []
    for each in records:
        if isinstance(each, Tokens) and each.request_id == request_id:
            ids[each.first_token :] = each.ids
    return ids


def test_a_journaled_token_that_is_edited_changes_the_continuation(
    model: Path, ray_address: str, tmp_path: Path
) -> None:
    """So what goes on is what was delivered, and not the prompt run again. The end of the file is torn, besides."""
    state, reference = tmp_path / "state", Reference(model)
    flags = {"state_dir": state, "ray_address": ray_address, "drain_timeout_s": 0}
    with LocalCluster(model, tensor=2, dtype="float64", **flags) as cluster:  # type: ignore[arg-type]
        client = cluster.client()
        original = client.generate(PROMPT, sampling=GREEDY)
        stream = client.stream(PROMPT, sampling=GREEDY, request_id="edited")
        for event in stream:
            if event.sequence >= 40:
                break
        assert cluster.close() == 0
    records, _ = unframe(next((state / "journal").glob("*.log")).read_bytes())
    held = ids_of(records, "edited")
    assert 40 < len(held) < 450 and held == list(original.token_ids[: len(held)])
    assert any(isinstance(each, Assigned) and each.request_id == "edited" for each in records)
    other = next(token_id for token_id in range(5, 300) if token_id != held[-1])
    ids = edit(state / "journal", "edited", other)
    assert ids == [*held[:-1], other]
    with LocalCluster(model, tensor=2, dtype="float64", **flags) as cluster:  # type: ignore[arg-type]
        answer = cluster.client().generate(PROMPT, sampling=GREEDY, request_id="edited")
        damaged = [event for event in cluster.events() if event.kind == "journal.damaged"]
    assert [event.detail["reason"] for event in damaged] == ["its last record is incomplete"]
    assert list(answer.token_ids[: len(ids)]) == ids
    expected = reference.after_each(PROMPT, answer.token_ids)
    assert answer.token_ids[len(ids) :] == expected.ids[len(ids) :]
    assert answer.token_ids[len(ids) :] != original.token_ids[len(ids) :]
    assert answer.usage.recomputed_tokens == answer.usage.prompt_tokens + len(ids)
