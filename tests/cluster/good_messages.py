"""Messages that a cluster of the tiny model answers, for every RPC: what fuzzing spoils, and mixes with the spoilt.

Ids are drawn from small pools, so that requests and jobs meet others of the same id, with the same content and with
other. Knows the tiny model's vocabulary and its names, and no invariant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.message import Message
from hypothesis import strategies as st

from echelon.v1 import cluster_pb2, generation_pb2, jobs_pb2
from tests.cluster.messages import TEXTS, nearly

VOCABULARY, MAX_CONTEXT, MAX_RUNNING = 320, 512, 8
PROMPTS = ("x", "Geese fly so", "An echelon is a formation", "敏捷的棕色狐狸", "\N{GRINNING FACE}")
REQUEST_IDS = ("", "fuzz-1", "fuzz-2", "fuzz/3:a")
JOB_IDS = ("", "fuzz-a", "fuzz-b")

Strategy = st.SearchStrategy[Any]


def some(**values: Strategy) -> Strategy:
    """A dictionary of some of these."""
    return st.fixed_dictionaries({}, optional=values)


def tokens(max_size: int = 30) -> Strategy:
    return st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=max_size)


PLAIN: Mapping[str, Strategy] = {
    "temperature": st.sampled_from((0.0, 0.7, 1.0)) | st.floats(0, 1e6),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(0, VOCABULARY + 9),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 3),
    "stop": st.lists(st.sampled_from(("e", "fo", "\n", " the", "zzz")), max_size=3),
    "stop_token_ids": tokens(4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logprobs": st.integers(0, 20),
    "prompt_logprobs": st.integers(0, 20),
    "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=5),
    "ignore_eos": st.booleans(),
    "include_stop": st.booleans(),
    "bad_words": st.lists(st.sampled_from(("e", "the", " ", "echelon")), max_size=3),
}
FORMS: tuple[Mapping[str, Any], ...] = (
    {"json_schema": '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'},
    {"json_schema": '{"enum": ["x", 1, null]}'},
    {"regex": "[a-f]{2,5}"},
    {"regex": "(yes|no)"},
    {"grammar": 'start: "a" start | "b"'},
    {"json_object": True},
    {"choice": generation_pb2.Alternatives(texts=["left", "right", "right on"])},
)


@st.composite
def samplings(draw: st.DrawFn) -> generation_pb2.SamplingParams:
    most = draw(st.integers(1, 12))
    lengths = {"max_tokens": most, "min_tokens": draw(st.integers(0, most))}
    form = draw(st.sampled_from(({}, {}, {}, *FORMS)))
    count = {"n": draw(st.sampled_from((1, 1, 1, 2, 3, MAX_RUNNING)))}
    ends = {"ignore_eos": False, "min_tokens": 0} if form else {}  # it ends where its form is complete
    return generation_pb2.SamplingParams(**{**draw(some(**PLAIN)), **lengths, **form, **count, **ends})


def chats() -> Strategy:
    message = st.builds(
        generation_pb2.ChatMessage, role=st.sampled_from(("user", "system")), content=st.sampled_from(PROMPTS)
    )
    return st.builds(generation_pb2.ChatPrompt, messages=st.lists(message, min_size=1, max_size=3))


def generations() -> Strategy:
    inputs = (
        st.builds(lambda text: {"text": text}, st.sampled_from(PROMPTS))
        | st.builds(lambda ids: {"token_ids": generation_pb2.TokenIds(ids=ids)}, tokens())
        | st.builds(lambda chat: {"chat": chat}, chats())
    )
    held = st.lists(
        st.builds(generation_pb2.TokenIds, ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=3)), max_size=2
    )
    others = some(
        model=st.sampled_from(("", "tiny")),
        request_id=st.sampled_from(REQUEST_IDS),
        priority=st.integers(-5, 5),
        cache_salt=st.sampled_from(("", "tenant")),
        resume=st.builds(generation_pb2.Resume, received=held),
    )
    build = lambda prompt, sampling, rest: generation_pb2.GenerateRequest(**prompt, sampling=sampling, **rest)  # noqa: E731
    return st.builds(build, inputs, samplings(), others)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TEXTS) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("a", "b", "type")), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A line of a batch file, one time in two with a field that is JSON and nothing more."""
    body: dict[str, Any] = {"prompt": draw(st.sampled_from(PROMPTS)), "max_tokens": draw(st.integers(1, 6))}
    line: dict[str, Any] = {"custom_id": draw(st.sampled_from("abcdef"))}
    if draw(st.booleans()):
        line |= {"url": "/v1/completions", "method": "POST", "body": body}
    else:
        line |= body
    if draw(st.booleans()):
        spoilt = draw(st.sampled_from((line, line.get("body", line))))
        keys = ("custom_id", "messages", "template_args", "token_ids", "n", "seed", "response_format", *body, *PLAIN)
        spoilt[draw(st.sampled_from(keys))] = draw(JSON)
    deep = draw(st.sampled_from((0, 0, 0, 0, 50, 330, 700, 5000)))
    text = json.dumps(line, ensure_ascii=draw(st.booleans()))
    if deep:
        nested = '{"custom_id": "deep", "messages": [{"role": "user", "content": "x"}], "template_args": {"a": @}}'
        text = nested.replace("@", "[" * deep + "]" * deep)
    return text.encode(errors="surrogatepass")


def sources() -> Strategy:
    some_lines = st.lists(lines(), min_size=1, max_size=3).map(b"\n".join)
    return st.builds(jobs_pb2.BatchSource, jsonl=some_lines | some_lines | st.binary(max_size=30))


def job_names() -> Strategy:
    return st.sampled_from(("batchJobs/fuzz-a", "fuzz-b") * 3 + ("batchJobs/", "batchJobs/nobody"))


GOOD: Mapping[str, Strategy] = {
    "Generate": generations(),
    "StreamGenerate": generations(),
    "CancelGeneration": st.builds(
        generation_pb2.CancelGenerationRequest, request_ids=st.lists(st.sampled_from(REQUEST_IDS), max_size=4)
    ),
    "Tokenize": st.builds(generation_pb2.TokenizeRequest, text=st.sampled_from(PROMPTS))
    | st.builds(generation_pb2.TokenizeRequest, chat=chats()),
    "Detokenize": st.builds(generation_pb2.DetokenizeRequest, token_ids=tokens()),
    "CreateBatchJob": st.builds(
        jobs_pb2.CreateBatchJobRequest, batch_job_id=st.sampled_from(JOB_IDS), source=sources()
    ),
    "GetBatchJob": st.builds(jobs_pb2.GetBatchJobRequest, name=job_names()),
    "ListBatchJobs": st.builds(
        jobs_pb2.ListBatchJobsRequest, page_size=st.integers(0, 5), page_token=st.sampled_from(("", "fuzz-a"))
    ),
    "CancelBatchJob": st.builds(jobs_pb2.CancelBatchJobRequest, name=job_names()),
    "WatchBatchJob": st.builds(jobs_pb2.WatchBatchJobRequest, name=job_names()),
    "StreamBatchJobResults": st.builds(
        jobs_pb2.StreamBatchJobResultsRequest, name=job_names(), after_cursor=st.integers(0, 4), follow=st.booleans()
    ),
    "ListModels": st.builds(cluster_pb2.ListModelsRequest),
    "GetCluster": st.builds(cluster_pb2.GetClusterRequest),
    "GetExpertLoad": st.builds(cluster_pb2.GetExpertLoadRequest),
    "WatchClusterEvents": st.builds(
        cluster_pb2.WatchClusterEventsRequest, after_sequence=st.integers(0, 9), follow=st.booleans()
    ),
}


def nearly_good(name: str) -> st.SearchStrategy[Message]:
    """Messages of this RPC that are good, or would be but for a field or two."""
    return nearly(GOOD[name])


def struct_of(**values: float | str) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(values)
    return struct


def _chat(**fields: Any) -> generation_pb2.ChatPrompt:
    return generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage(role="user", content="x")], **fields)


def _job(jsonl: str) -> jobs_pb2.CreateBatchJobRequest:
    return jobs_pb2.CreateBatchJobRequest(source=jobs_pb2.BatchSource(jsonl=jsonl.encode()))


_CALL = generation_pb2.ToolCall(id="a", name="b", arguments_json="[" * 100_000)
_DEEP = '{"custom_id": "a", "messages": [{"role": "user", "content": "x"}], "template_args": {"a": %s%s}}'
_ENUM = generation_pb2.SamplingParams(json_schema='{"enum": [1]}', max_tokens=3, min_tokens=2)
# What once ended with INTERNAL or UNKNOWN, was lost on its way, or took the coordinator with it.
FOUND: Mapping[str, tuple[str, Message]] = {
    "NaN in a template's argument": (
        "Generate",
        generation_pb2.GenerateRequest(chat=_chat(template_args=struct_of(a=math.nan))),
    ),
    "bottomless arguments of a call": (
        "Tokenize",
        generation_pb2.TokenizeRequest(
            chat=generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage(role="assistant", tool_calls=[_CALL])])
        ),
    ),
    "an error of wide characters": (
        "Generate",
        generation_pb2.GenerateRequest(text="x", model="\N{GRINNING FACE}" * 2000),
    ),
    "a long key": ("CreateBatchJob", _job('{"custom_id": "a", "prompt": "x", "%s": 1}' % ("k" * 20_000))),
    "deep JSON": ("CreateBatchJob", _job(_DEEP % ("[" * 600, "]" * 600))),
    "a cursor beyond 63 bits": (
        "StreamBatchJobResults",
        jobs_pb2.StreamBatchJobResultsRequest(name=f"batchJobs/{JOB_IDS[1]}", after_cursor=2**64 - 1),
    ),
    "a text of ten million characters": ("StreamGenerate", generation_pb2.GenerateRequest(text="x" * 10_000_000)),
    "a salt of forty million": ("Generate", generation_pb2.GenerateRequest(text="x", cache_salt="x" * 40_000_000)),
    "a form that is complete before min_tokens": ("Generate", generation_pb2.GenerateRequest(text="x", sampling=_ENUM)),
    "five million ids": ("CancelGeneration", generation_pb2.CancelGenerationRequest(request_ids=["x"] * 5_000_000)),
}
