"""A generation as a call: what generate() and stream() take, and the request that it becomes.

Pure, shared by the two transports, like the rest of the SDK's calls in `calls.py`. Everything that can be said of an
input without the model is checked here, before anything is sent.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, cast

from echelon import convert
from echelon.chat import ChatMessage, ChatPrompt, chat_message
from echelon.errors import InvalidRequestError
from echelon.generation_session import GenerationSession, Message, Received
from echelon.internal import calls
from echelon.profiles import Settings
from echelon.sampling import SamplingParams, check_text, shown
from echelon.structured import ResponseModel, json_schema_of
from echelon.types import Admitted, Completion, StreamEvent
from echelon.v1 import generation_pb2


class GenerateOptions(TypedDict, total=False):
    """What generate() and stream() take beside a prompt: another input, the model, and SamplingParams or its fields.

    request_id: the same id with the same content attaches to the running request. timeout_s: until the whole answer.
    priority: lower goes first. cache_salt: cached prefixes are shared only with requests of the same salt.
    """

    messages: Sequence[ChatMessage | Mapping[str, Any]]
    token_ids: Sequence[int]
    tools: Sequence[Mapping[str, object]]
    template_args: Mapping[str, object]
    model: str
    request_id: str
    priority: int
    cache_salt: str
    timeout_s: float
    sampling: SamplingParams
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str]
    max_tokens: int | None
    min_tokens: int | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str]
    include_stop: bool
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: str | Mapping[str, object] | None
    regex: str | None
    grammar: str | None
    json_object: bool
    choice: Sequence[str] | None


GenerateCall = calls.Call[Received, Message, StreamEvent, Completion]


def generate(settings: Settings, prompt: str | None, options: GenerateOptions) -> GenerateCall:
    """One generation, whether its tokens are wanted one by one or at the end."""
    fields: dict[str, Any] = dict(options)
    chat: dict[str, Any] = {name: fields.pop(name, None) for name in ("tools", "template_args")}
    request = _with_input(prompt, fields.pop("messages", None), fields.pop("token_ids", None), chat)
    request.model = check_text("model", fields.pop("model", None) or "", "model")
    request.request_id = check_text("request_id", fields.pop("request_id", None) or uuid.uuid4().hex, "request_id")
    request.priority = _priority(fields.pop("priority", 0))
    request.cache_salt = check_text("cache_salt", fields.pop("cache_salt", None) or "", "cache_salt")
    timeout_s = fields.pop("timeout_s", settings.timeout_s)
    calls.check_timeout(timeout_s)
    sampling = fields.pop("sampling", SamplingParams())
    request.sampling.CopyFrom(convert.sampling_to_proto(replace(sampling, **fields)))

    def resumed(received: Received) -> generation_pb2.GenerateRequest:
        if not received:
            return request
        resume = generation_pb2.Resume(received=[generation_pb2.TokenIds(ids=ids) for ids in received])
        again = generation_pb2.GenerateRequest(resume=resume)
        again.MergeFrom(request)
        return again

    session = GenerationSession(request.request_id, timeout_s, settings.retry)
    method, response = "echelon.v1.GenerationService/StreamGenerate", generation_pb2.StreamGenerateResponse
    return calls.Call(method, resumed, response, convert.stream_from_proto, session, True, session.request_id)


MapInput = str | Mapping[str, Any]  # a prompt, or options of generate() and a prompt among them


def generate_input(settings: Settings, item: MapInput, shared: GenerateOptions) -> GenerateCall:
    """One generation of a map: its own options go before those of all."""
    if isinstance(item, str):
        return generate(settings, item, shared)
    if not isinstance(item, Mapping):
        message = f"a prompt must be a string or a mapping of generate()'s options, got {item!r}"
        raise InvalidRequestError(message, field="prompts")
    options: dict[str, Any] = {**shared, **item}
    return generate(settings, options.pop("prompt", None), cast(GenerateOptions, options))


def in_form_of(response_model: type[ResponseModel], options: GenerateOptions) -> GenerateOptions:
    """The options with the answer's form, which must not be asked for twice."""
    sampling = options.get("sampling", SamplingParams())
    if options.get("json_schema") is not None or sampling.json_schema is not None:
        raise InvalidRequestError("json_schema cannot be combined with response_model", field="sampling.json_schema")
    return {**options, "json_schema": json_schema_of(response_model)}


def admitted(call: GenerateCall) -> Admitted | None:
    """What the server said when it took the request; None before."""
    assert isinstance(call.session, GenerationSession)
    return call.session.admitted


def _with_input(
    text: str | None,
    messages: Sequence[ChatMessage | Mapping[str, Any]] | None,
    token_ids: Sequence[int] | None,
    chat: Mapping[str, Any],
) -> generation_pb2.GenerateRequest:
    """A request with exactly one input. chat: what goes with messages alone."""
    given = [
        name
        for name, value in (("prompt", text), ("messages", messages), ("token_ids", token_ids))
        if value is not None
    ]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidRequestError(f"give one of prompt, messages and token_ids, got {found}", field="input")
    if messages is None and any(value is not None for value in chat.values()):
        name = next(name for name, value in chat.items() if value is not None)
        raise InvalidRequestError(f"{name} are for messages alone", field=name)
    request = generation_pb2.GenerateRequest()
    if text is not None:
        request.text = check_text("prompt", text, "prompt")
    elif token_ids is not None:
        request.token_ids.ids.extend(calls.check_ids(token_ids))
        request.token_ids.SetInParent()
    elif messages is not None:
        request.chat.CopyFrom(convert.chat_to_proto(_chat(messages, chat)))
        request.chat.SetInParent()
    return request


def _chat(messages: Sequence[ChatMessage | Mapping[str, Any]], chat: Mapping[str, Any]) -> ChatPrompt:
    tools, template_args = chat.get("tools") or (), chat.get("template_args") or {}
    for name, value in (("messages", messages), ("tools", tools)):
        if not isinstance(value, (list, tuple)):
            raise InvalidRequestError(f"{name} must be a list, got {shown(value)}", field=name)
    if not isinstance(template_args, Mapping):
        raise InvalidRequestError(f"template_args must be a mapping, got {shown(template_args)}", field="template_args")
    made = tuple(chat_message(index, message) for index, message in enumerate(messages))
    return ChatPrompt(made, tuple(tools), template_args)


def _priority(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**31) <= value < 2**31:
        raise InvalidRequestError(f"priority must be a 32-bit integer, got {value!r}", field="priority")
    return value
