"""The streams under which faults strike: of every kind, apart from each other, and heard as they were sent."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from echelon import Client
from echelon.chaos.load import LATE, Streams, late, late_texts, mixed, stopped
from echelon.errors import NotFoundError
from tests.unit.scripted import IDS, WORDS, ScriptedServer, fail, tokens


def test_sixteen_streams_are_of_every_kind() -> None:
    asked = mixed(16, 100)
    kinds = Counter(each.name.partition("-")[0] for each in asked)
    assert kinds.keys() == {"greedy", "sampled", "choices", "penalties", "stop", "schema"}
    assert max(kinds.values()) - min(kinds.values()) <= 1
    assert len({each.name for each in asked}) == 16
    assert {each.sampling.n for each in asked if each.name.startswith("choices")} == {3}
    assert all(each.sampling.seed is not None and each.sampling.logprobs is not None for each in asked)
    assert sum(each.sampling.json_schema is not None for each in asked) == kinds["schema"]


def test_late_prompts_fit_and_begin_unlike() -> None:
    """Blocks of a cache are looked up from the beginning: one id apart is enough."""
    prompts = [late(512, number) for number in range(100)]
    assert len({each.token_ids[:16] for each in prompts}) == 100
    assert all(max(each.token_ids) < 256 for each in prompts)
    assert all(len(each.token_ids) + (each.sampling.max_tokens or 0) <= 512 for each in prompts)
    assert len(late(40, 1).token_ids) == 24


@given(st.text(alphabet="ab cde", max_size=60))
def test_a_late_text_comes_late_and_first_there(text: str) -> None:
    for part in late_texts(text):
        assert text.find(part) >= len(text) * 2 // 3


def test_only_streams_to_be_stopped_are_given_a_stop() -> None:
    asked = mixed(6, 100)
    answers = {each.name: "abc def ghi jkl" for each in asked}
    changed = [new.name for old, new in zip(asked, stopped(asked, answers), strict=True) if new != old]
    assert changed == ["stop-4"]
    (given_stop,) = (each.sampling.stop for each in stopped(asked, answers) if each.name == "stop-4")
    assert given_stop == (" jkl",) or answers["stop-4"].find(given_stop[0]) >= 10
    assert stopped(asked, dict.fromkeys(answers, "a" * 40)) == asked, "nothing in it comes late"


def test_what_is_heard_is_what_was_sent_and_when() -> None:
    with ScriptedServer() as server, Client(server.address, max_retries=0) as client:
        refused = NotFoundError("model x is not served")
        server.on("StreamGenerate", tokens(0, 6, end=True))
        streams = Streams(client, timeout_s=250.0)  # so long nothing is waited for
        began = time.time()
        streams.start([replace(mixed(1, 24)[0], name="well")])
        assert not streams.wait_tokens(7), "it has ended"
        server.on("StreamGenerate", tokens(0, 2, then=lambda context: fail(context, refused)))
        streams.start([replace(late(64, 0), name=LATE)])
        heard = streams.results()
    assert [one.event.token_ids for one in heard["well"].arrivals] == [(token_id,) for token_id in IDS]
    assert "".join(one.event.text for one in heard["well"].arrivals) == "".join(WORDS)
    times = [one.unix_s for one in heard["well"].arrivals]
    assert times == sorted(times) and began <= times[0] <= time.time()
    assert heard["well"].completion and heard["well"].completion.token_ids == IDS
    assert (heard[LATE].completion, len(heard[LATE].arrivals)) == (None, 2)
    assert "model x is not served" in heard[LATE].error
    assert server.requests["StreamGenerate"][1].token_ids.ids == list(late(64, 0).token_ids)
