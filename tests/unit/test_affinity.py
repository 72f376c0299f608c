"""Prefix affinity: a request goes where its beginning is known, until waiting there costs more than recomputing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.requests.affinity import Prefixes
from coordinator.requests.events import Submit
from coordinator.requests.router import RUNNING_TOKENS, Link, Reason, Router, Size, choose
from echelon.internal.block_hash import chain, root_hash
from echelon.internal.link import Assign, Fence, Finish, Progress, Prompted, Released, ReplicaHello, Sampling
from tests.unit.core_shell import FENCE, HELLO, STOP_ID, Shell, request

BLOCK_TOKENS = 4
ROOMY = ReplicaHello(slots=64, kv_blocks=10_000, block_tokens=BLOCK_TOKENS, max_context=10_000)


def blocks(ids: Sequence[int], salt: str = "") -> list[bytes]:
    return chain(root_hash(salt), ids, BLOCK_TOKENS)


def prompt(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple(range(salt, salt + length))


def assign(name: str) -> Assign:
    return Assign(name, 1, (1,), (Progress(0),), Sampling(0.0, 1.0, 0, 8, 7))


def link(replica: int, known: int = 0, uncomputed: int = 0, choices: int = 0) -> Link:
    """A replica that has computed so many tokens of the prompt, has others to compute, and holds so many choices."""
    made = Link(Fence(1, replica, 1), ROOMY)
    made.prefixes.use(blocks(prompt(known)))
    if choices:
        made.hold("running", 1, Size(1, (0,) * choices, 9))
    if uncomputed:
        made.assign(assign("waiting"), Size(uncomputed, (0,), 9))
    return made


@pytest.mark.parametrize(
    ("first", "second", "chosen", "reason"),
    [
        ({}, {}, 0, Reason.LEAST_LOADED),
        ({}, {"known": 400}, 1, Reason.PREFIX),
        ({"known": 200}, {"known": 400}, 1, Reason.PREFIX),
        ({"known": 400}, {"known": 400}, 0, Reason.PREFIX),
        ({"choices": 1}, {}, 1, Reason.LEAST_LOADED),
        ({"known": 400, "choices": 1}, {}, 0, Reason.PREFIX),  # 256 beside it, 400 to recompute
        ({"known": 400, "choices": 2}, {}, 1, Reason.PREFIX_LOADED),  # 512 beside it
        ({"known": 400, "choices": 9}, {"choices": 8}, 0, Reason.PREFIX),  # what counts is the difference
        ({"known": 400, "uncomputed": 100}, {}, 0, Reason.PREFIX),  # 100 ahead of it, and 256 beside it
        ({"known": 400, "uncomputed": 150}, {}, 1, Reason.PREFIX_LOADED),
        ({"known": 400, "choices": 2}, {"known": 200}, 1, Reason.PREFIX_LOADED),
        ({"known": 800, "choices": 2}, {"known": 200}, 0, Reason.PREFIX),
        ({"uncomputed": 1}, {"choices": 2}, 0, Reason.LEAST_LOADED),
    ],
)
def test_the_choice(first: dict[str, int], second: dict[str, int], chosen: int, reason: Reason) -> None:
    assert RUNNING_TOKENS == 256
    links = [link(0, **first), link(1, **second)]
    assert choose(links, Size(1000, (0,), 1008), blocks(prompt(1000))) == (links[chosen], reason)
    assert choose(links[::-1], Size(1000, (0,), 1008), blocks(prompt(1000)))[0] is links[chosen], "in whatever order"
    mirrored = [link(0, **second), link(1, **first)]
    if first != second and (first.get("known"), second.get("known")) != (400, 400):
        assert choose(mirrored, Size(1000, (0,), 1008), blocks(prompt(1000)))[0] is mirrored[1 - chosen]


loads = st.fixed_dictionaries(
    {"known": st.integers(0, 300), "uncomputed": st.integers(0, 300), "choices": st.integers(0, 20)}
)


@given(st.lists(loads, min_size=1, max_size=5), st.integers(1, 400))
def test_a_replica_is_chosen_whose_waiting_and_computing_end_first(given: list[dict[str, int]], length: int) -> None:
    links = [link(index, **load) for index, load in enumerate(given)]
    size, prefix = Size(length, (0,), length + 8), blocks(prompt(length))
    chosen, reason = choose(links, size, prefix)

    def ready_after(load: dict[str, int]) -> int:
        """Prompt tokens until its own prompt is computed, others' rows counted as such."""
        known = min(load["known"], length) // BLOCK_TOKENS * BLOCK_TOKENS
        others = load["choices"] + (load["uncomputed"] > 0)
        return load["uncomputed"] + RUNNING_TOKENS * others + length - min(known, length - 1)

    assert ready_after(given[links.index(chosen)]) == min(map(ready_after, given))
    known = [each.cached_tokens(size, prefix) for each in links]
    assert (reason is Reason.LEAST_LOADED) == (max(known) == 0)
    assert (reason is Reason.PREFIX) == (0 < known[links.index(chosen)] == max(known))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 12)), max_size=40),
    st.integers(1, 20),
)
def test_prefixes_are_a_bounded_memory_of_what_was_used_last(used: list[tuple[int, int, int]], most: int) -> None:
    """Against the plainest one: prompts of a common beginning and an own end, the newest uses kept, ends lost first."""
    prefixes, uses = Prefixes(most), list[bytes]()
    prompts = [blocks(prompt(4 * common) + prompt(4 * own, 1000 * (1 + kind))) for kind, common, own in used]
    for each in prompts:
        prefixes.use(each)
        uses = [block for block in uses if block not in each] + each[::-1]
        uses = uses[-most:]
        assert len(prefixes) == len(uses) <= most
        assert prefixes.match(each) == min(len(each), most)
    for each in prompts:
        known = [block in uses for block in each]
        assert known == sorted(known, reverse=True), "no block is known without those before it"
        assert prefixes.match(each) == sum(known)


def test_a_prompt_that_is_wholly_known_leaves_its_last_token_to_compute() -> None:
    one = link(0, known=8)
    assert one.cached_tokens(Size(8, (0,), 9), blocks(prompt(8))) == 7
    assert one.cached_tokens(Size(11, (0,), 19), blocks(prompt(11))) == 8
    assert one.cached_tokens(Size(11, (0,), 19), blocks(prompt(11), "tenant")) == 0, "salts share nothing"


def test_what_is_computed_waits_no_more_and_what_is_released_neither() -> None:
    one = link(0, known=8)
    one.assign(assign("a"), Size(10, (2, 3), 20), blocks(prompt(10)))
    assert one.load_tokens() == 10 + 5 - 8 + 2 * RUNNING_TOKENS
    one.assign(assign("b"), Size(6, (0,), 20))
    assert one.uncomputed_tokens == 7 + 6
    one.computed("a", 1)
    one.computed("a", 1)
    assert one.uncomputed_tokens == 6
    one.release("b", 1)
    one.release("a", 1)
    assert one.load_tokens() == 0


def test_what_an_epoch_computed_is_known_across_its_links_and_goes_with_it() -> None:
    router = Router()
    first = Link(Fence(1, 0, 1), ROOMY)
    assert router.open(first)
    first.prefixes.use(blocks(prompt(8)))
    router.close(first.fence)
    again = Link(Fence(1, 0, 1), ROOMY)
    assert router.open(again)
    assert again.prefixes.match(blocks(prompt(8))) == 2
    router.end(0, 1)
    next_epoch = Link(Fence(1, 0, 2), replace(ROOMY, kv_blocks=3))
    assert router.open(next_epoch)
    assert next_epoch.prefixes.match(blocks(prompt(8))) == 0
    next_epoch.prefixes.use(blocks(prompt(20)))
    assert len(next_epoch.prefixes) == 3, "no more than its cache holds"


def pair(replicas: int) -> Shell:
    shell = Shell(hello=replace(HELLO, slots=8, kv_blocks=1000, max_context=400), replicas=replicas)
    for replica in (0, 1):
        shell.open(fence=replace(FENCE, replica=replica))
    return shell


def sent(shell: Shell) -> list[int]:
    """The replica of each assignment."""
    return [command.fence.replica for command in shell.commands for _ in command.assigns]


def one_computes(shell: Shell) -> None:
    """A long prompt beside another request, which then ends: replica 0 is idle, replica 1 has its work before it."""
    shell.post(Submit(1, request("busy")))
    shell.post(Submit(2, request("a", prompt=prompt(300))))
    assert sent(shell) == [0, 1]
    shell.run(0, STOP_ID, finish=Finish.STOP, name="busy")
    shell.report(released=(Released("busy", 1),))


@pytest.mark.parametrize(
    ("computed", "salt", "chosen"),
    [
        (True, "", 1),  # 256 tokens' worth of a choice beside it
        (False, "", 0),  # 556 with the prompt that it would wait for
        (True, "tenant", 0),  # another's prefixes are not known to it
    ],
)
def test_the_core_sends_a_prompt_back_to_where_it_was_computed(computed: bool, salt: str, chosen: int) -> None:
    shell = pair(2)
    one_computes(shell)
    if computed:
        shell.report(prompted=(Prompted("a", 2, 0),), fence=replace(FENCE, replica=1))
    shell.post(Submit(3, request("b", prompt=(*prompt(300), 7), cache_salt=salt)))
    assert sent(shell)[2:] == [chosen]
    assert [shell.core.affinity_hits(replica) for replica in (0, 1)] == [0, chosen]


def test_one_replica_costs_no_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.requests.core.chain", lambda *arguments: 1 // 0)
    shell = pair(1)
    shell.post(Submit(1, request("a")))
    assert sent(shell) == [0]
    with pytest.raises(ZeroDivisionError):
        pair(2).post(Submit(1, request("a")))
