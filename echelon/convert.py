"""The public nouns of generation as protobuf messages, both directions; one pair of functions a noun.

Used by the SDK and by the coordinator's server, and the only place where the two meet. Pure; validates no more than
the nouns themselves do (their InvalidRequestError passes through). Jobs are in `convert_jobs.py`, the cluster's nouns
in `convert_cluster.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from google.protobuf import duration_pb2, json_format, struct_pb2, timestamp_pb2

from echelon.chat import ChatMessage, ChatPrompt, ToolCall
from echelon.errors import InternalError, InvalidRequestError
from echelon.sampling import SamplingParams
from echelon.types import (
    Admitted,
    Choice,
    Completion,
    FinishReason,
    StreamEvent,
    Timing,
    TokenLogprob,
    Usage,
)
from echelon.v1 import generation_pb2

_FINISHES = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}
_FINISH_REASONS: dict[int, FinishReason] = {value: reason for reason, value in _FINISHES.items()}
_OPTIONAL_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "min_tokens",
    "seed",
    "n",
    "logprobs",
    "prompt_logprobs",
)
_TOOL_KEYS = ("type", "function", "name", "description", "parameters", "properties", "required")
MAX_EXACT_INTEGER = 2**53  # beyond, a double is no integer that somebody wrote
_TEXT_CONSTRAINTS = ("json_schema", "regex", "grammar")


def sampling_to_proto(sampling: SamplingParams) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(
        **{name: getattr(sampling, name) for name in (*_OPTIONAL_SAMPLING, *_TEXT_CONSTRAINTS)},
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        logit_bias=sampling.logit_bias,
        ignore_eos=sampling.ignore_eos,
        include_stop=sampling.include_stop,
        bad_words=sampling.bad_words,
        json_object=sampling.json_object or None,  # type: ignore[arg-type]  # unset
        choice=None if sampling.choice is None else generation_pb2.Alternatives(texts=sampling.choice),
    )


def sampling_from_proto(message: generation_pb2.SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)}
    match message.WhichOneof("constraint"):
        case None:
            pass
        case "choice":
            given["choice"] = tuple(message.choice.texts)
        case kind:
            given[kind] = getattr(message, kind)
    return SamplingParams(
        **given,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias) or None,
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        bad_words=tuple(message.bad_words),
    )


def message_to_proto(message: ChatMessage) -> generation_pb2.ChatMessage:
    calls = [
        generation_pb2.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json)
        for call in message.tool_calls
    ]
    return generation_pb2.ChatMessage(
        role=message.role, content=message.content, tool_calls=calls, tool_call_id=message.tool_call_id
    )


def message_from_proto(message: generation_pb2.ChatMessage) -> ChatMessage:
    calls = tuple(ToolCall(call.id, call.name, call.arguments_json) for call in message.tool_calls)
    return ChatMessage(message.role, message.content, calls, message.tool_call_id)


def chat_to_proto(chat: ChatPrompt) -> generation_pb2.ChatPrompt:
    """Raises InvalidRequestError for tools and arguments that are not JSON."""
    return generation_pb2.ChatPrompt(
        messages=[message_to_proto(message) for message in chat.messages],
        tools=[_struct(f"tools[{place}]", tool) for place, tool in enumerate(chat.tools)],
        template_args=_struct("template_args", chat.template_args),
    )


def chat_from_proto(message: generation_pb2.ChatPrompt) -> ChatPrompt:
    return ChatPrompt(
        messages=tuple(message_from_proto(chat) for chat in message.messages),
        tools=tuple(_mapping(f"tools[{place}]", tool) for place, tool in enumerate(message.tools)),
        template_args=_mapping("template_args", message.template_args),
    )


def _struct(name: str, value: Mapping[str, object]) -> struct_pb2.Struct:
    try:
        plain = json.loads(json.dumps(dict(value), allow_nan=False))
        return json_format.ParseDict(plain, struct_pb2.Struct())
    except (json_format.ParseError, TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} must be a JSON object: {error}", field=name) from None


def _mapping(name: str, message: struct_pb2.Struct) -> dict[str, object]:
    """What a template prints must be what was sent, but a Struct has doubles alone, and its keys have no order."""
    try:
        value = json_format.MessageToDict(message)
    except ValueError as error:  # a number that JSON does not have
        raise InvalidRequestError(f"{name} must be a JSON object: {error}", field=name) from None
    return _ordered(value)


def _ordered(value: Mapping[str, object]) -> dict[str, object]:
    """A tool's keys as OpenAI writes them, all others by the alphabet: the same prompt in every process."""
    places = {key: place for place, key in enumerate(_TOOL_KEYS)}
    items = sorted(value.items(), key=lambda item: (places.get(item[0], len(places)), item[0]))
    return {key: _told(each) for key, each in items}


def _told(value: object) -> object:
    match value:
        case float() if value.is_integer() and abs(value) <= MAX_EXACT_INTEGER:
            return int(value)
        case list():
            return [_told(item) for item in value]
        case dict():
            return _ordered(value)
    return value


def logprob_to_proto(logprob: TokenLogprob) -> generation_pb2.TokenLogprob:
    top = [generation_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return generation_pb2.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, top=top)


def logprob_from_proto(message: generation_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob, tuple((top.token_id, top.logprob) for top in message.top))


def usage_to_proto(usage: Usage) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        recomputed_tokens=usage.recomputed_tokens,
        cached_tokens=usage.cached_tokens,
    )


def usage_from_proto(message: generation_pb2.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.recomputed_tokens, message.cached_tokens)


def choice_to_proto(choice: Choice) -> generation_pb2.Choice:
    return generation_pb2.Choice(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        logprobs=[logprob_to_proto(logprob) for logprob in choice.logprobs],
        finish_reason=_FINISHES[choice.finish_reason],
        matched_stop=choice.matched_stop,
    )


def choice_from_proto(message: generation_pb2.Choice) -> Choice:
    if message.finish_reason not in _FINISH_REASONS:
        raise InternalError(f"the server ended a choice in a way this client does not know: {message.finish_reason}")
    return Choice(
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(logprob_from_proto(logprob) for logprob in message.logprobs),
        finish_reason=_FINISH_REASONS[message.finish_reason],
        matched_stop=message.matched_stop,
    )


def completion_to_proto(completion: Completion) -> generation_pb2.GenerateResponse:
    timing = completion.timing
    return generation_pb2.GenerateResponse(
        request_id=completion.request_id,
        model=completion.model,
        choices=[choice_to_proto(choice) for choice in completion.choices],
        usage=usage_to_proto(completion.usage),
        timing=generation_pb2.Timing(
            queue=_duration(timing.queue_s), ttft=_duration(timing.ttft_s), total=_duration(timing.total_s)
        ),
        prompt_logprobs=[logprob_to_proto(logprob) for logprob in completion.prompt_logprobs],
    )


def completion_from_proto(message: generation_pb2.GenerateResponse) -> Completion:
    if not message.choices:
        raise InternalError("the server's answer has no choice")
    timing = message.timing
    return Completion(
        request_id=message.request_id,
        model=message.model,
        choices=tuple(choice_from_proto(choice) for choice in message.choices),
        usage=usage_from_proto(message.usage),
        timing=Timing(_seconds(timing.queue), _seconds(timing.ttft), _seconds(timing.total)),
        prompt_logprobs=tuple(logprob_from_proto(logprob) for logprob in message.prompt_logprobs),
    )


def stream_to_proto(event: Admitted | StreamEvent | Completion) -> generation_pb2.StreamGenerateResponse:
    response = generation_pb2.StreamGenerateResponse
    match event:
        case StreamEvent(request_id, index, sequence, text, token_ids, logprobs):
            told = [logprob_to_proto(logprob) for logprob in logprobs]
            delta = generation_pb2.TokenDelta(
                index=index, sequence=sequence, text=text, token_ids=token_ids, logprobs=told
            )
            return response(request_id=request_id, delta=delta)
        case Admitted(request_id, prompt_tokens, seed):
            admitted = generation_pb2.Admitted(prompt_tokens=prompt_tokens, seed=seed)
            return response(request_id=request_id, admitted=admitted)
        case Completion():
            return response(request_id=event.request_id, final=completion_to_proto(event))


def stream_from_proto(message: generation_pb2.StreamGenerateResponse) -> Admitted | StreamEvent | Completion:
    match message.WhichOneof("event"):
        case "admitted":
            return Admitted(message.request_id, message.admitted.prompt_tokens, message.admitted.seed)
        case "delta":
            delta = message.delta
            logprobs = tuple(logprob_from_proto(logprob) for logprob in delta.logprobs)
            token_ids = tuple(delta.token_ids)
            return StreamEvent(message.request_id, delta.index, delta.sequence, delta.text, token_ids, logprobs)
        case "final":
            return completion_from_proto(message.final)
    raise InternalError("the server sent a stream message of a kind that this client does not know")


def timestamp_to_proto(unix_s: float) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(unix_s * 1e6))  # a double holds no nanoseconds since 1970
    return timestamp


def timestamp_from_proto(message: timestamp_pb2.Timestamp) -> float:
    return message.ToMicroseconds() / 1e6


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _seconds(message: duration_pb2.Duration) -> float:
    return message.ToNanoseconds() / 1e9
