"""From what a client sent to a request that is ready to run: checks, defaults, prompt ids, digest.

Runs in the coordinator, off its event loop (tokenising takes time). A pure function of its arguments: ids and seeds
are drawn by the caller, and no journal, queue or transport is known here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from coordinator.requests.nouns import Request
from coordinator.tokenizer import Tokenizer
from echelon.errors import InvalidRequestError, NotFoundError
from echelon.internal.link import Sampling
from echelon.types import ChatMessage, SamplingParams
from models.config import DefaultSampling, ModelConfig

DEFAULT_TIMEOUT_S = 600.0
JOB_PREFIX = "job."
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, and what its template is told besides."""

    messages: tuple[ChatMessage, ...]
    template_args: Mapping[str, object] = field(default_factory=dict)


Prompt = str | tuple[int, ...] | ChatPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateFields:
    """What a client sent, untouched. Empty strings and None are fields it left unset."""

    prompt: Prompt | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""
    request_id: str = ""
    deadline_unix_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What the front end must know of the served model; max_context is what it is served with."""

    name: str
    vocab_size: int
    max_context: int
    end_ids: tuple[int, ...] = ()
    default_sampling: DefaultSampling = field(default_factory=DefaultSampling)

    @classmethod
    def of(cls, name: str, max_context: int, config: ModelConfig) -> ModelFacts:
        return cls(
            name=name,
            vocab_size=config.vocab_size,
            max_context=max_context,
            end_ids=config.end_ids,
            default_sampling=config.default_sampling,
        )


def check_client_request_id(request_id: str) -> None:
    """Refuses ids that a client may not choose: odd characters, and the prefix under which job items run."""
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        raise InvalidRequestError(
            f"request_id must be 1 to 128 letters, digits or any of . _ : / -, got {request_id[:160]!r}",
            field="request_id",
        )
    if request_id.startswith(JOB_PREFIX):
        raise InvalidRequestError(
            f"request_id must not start with {JOB_PREFIX!r}: those are items of batch jobs", field="request_id"
        )


def check_model(model: str, facts: ModelFacts) -> None:
    """Refuses any name but the served one; the empty name stands for it."""
    if model not in ("", facts.name):
        raise NotFoundError(
            f"model {model!r} is not served; {facts.name!r} is", reason="MODEL_NOT_FOUND", field="model"
        )


def check_received(received: tuple[int, ...], facts: ModelFacts) -> None:
    """Refuses ids that no answer of this model can hold: a client says that it got them, and they are computed on."""
    _check_vocabulary(received, facts, "resume.received")


def resolve(
    fields: GenerateFields, facts: ModelFacts, tokenizer: Tokenizer, now: float, drawn_seed: int, drawn_id: str
) -> Request:
    """The request to run. drawn_seed and drawn_id fill what the client left open.

    Raises InvalidRequestError or NotFoundError naming the field.
    """
    check_model(fields.model, facts)
    prompt = _prompt_ids(fields.prompt, tokenizer)
    sampling = settle_sampling(fields.sampling, facts, drawn_seed)
    _check_vocabulary(prompt, facts, "token_ids" if isinstance(fields.prompt, tuple) else "text")
    _check_vocabulary(fields.sampling.stop_token_ids, facts, "sampling.stop_token_ids")
    wanted = len(prompt) + sampling.max_tokens
    if wanted > facts.max_context:
        raise InvalidRequestError(
            f"{len(prompt)} prompt tokens + max_tokens={sampling.max_tokens} = {wanted}, over max_context="
            f"{facts.max_context} of {facts.name!r}; {_context_remedy(len(prompt), facts.max_context)}",
            reason="CONTEXT_TOO_LONG",
            field="sampling.max_tokens" if len(prompt) < facts.max_context else "prompt",
        )
    deadline = now + DEFAULT_TIMEOUT_S if fields.deadline_unix_s is None else fields.deadline_unix_s
    return Request(
        request_id=fields.request_id or drawn_id,
        digest=digest_of(fields),
        model=facts.name,
        prompt=prompt,
        sampling=sampling,
        deadline_unix_s=deadline,
        opened_unix_s=now,
    )


def settle_sampling(sent: SamplingParams, facts: ModelFacts, drawn_seed: int) -> Sampling:
    """What the client set, else what generation_config.json says, else the documented default."""

    def first(*values: float | None) -> float:
        return next(value for value in values if value is not None)

    defaults = facts.default_sampling
    end_ids = () if sent.ignore_eos else facts.end_ids
    return Sampling(
        temperature=float(first(sent.temperature, defaults.temperature, 1.0)),
        top_p=float(first(sent.top_p, defaults.top_p, 1.0)),
        top_k=int(first(sent.top_k, defaults.top_k, 0)),
        max_tokens=16 if sent.max_tokens is None else sent.max_tokens,
        seed=drawn_seed if sent.seed is None else sent.seed,
        stop_token_ids=tuple(dict.fromkeys((*sent.stop_token_ids, *end_ids))),
        logprobs=sent.logprobs,
    )


def digest_of(fields: GenerateFields) -> bytes:
    """SHA-256 of the content as it was sent: neither the id, nor the deadline, nor anything the server filled in."""
    prompt = asdict(fields.prompt) if isinstance(fields.prompt, ChatPrompt) else fields.prompt
    content = {"model": fields.model, "prompt": prompt, "sampling": asdict(fields.sampling)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def _prompt_ids(prompt: Prompt | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    if prompt is None:
        raise InvalidRequestError("the request has no input; set one of text, token_ids or messages", field="prompt")
    if isinstance(prompt, ChatPrompt):
        if not prompt.messages:
            raise InvalidRequestError("messages is empty; send at least one message", field="messages")
        for place, message in enumerate(prompt.messages):
            if not message.role:
                raise InvalidRequestError(f"messages[{place}] has no role; set one, such as 'user'", field="messages")
        ids = tokenizer.chat(prompt.messages, prompt.template_args)
    elif isinstance(prompt, str):
        if not prompt:
            raise InvalidRequestError("text is empty; send at least one character", field="text")
        ids = tokenizer.encode(prompt)
    else:
        ids = prompt
    if not ids:
        raise InvalidRequestError("the prompt has no tokens; send at least one", field="prompt")
    return ids


def _check_vocabulary(ids: tuple[int, ...], facts: ModelFacts, name: str) -> None:
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < facts.vocab_size:
            raise InvalidRequestError(
                f"{name}[{position}] = {token_id} is outside the vocabulary of {facts.name!r}, "
                f"which has {facts.vocab_size} ids from 0 to {facts.vocab_size - 1}",
                field=name,
            )


def _context_remedy(prompt_tokens: int, max_context: int) -> str:
    room = max_context - prompt_tokens
    if room >= 1:
        return f"set max_tokens to {room} or less, or shorten the prompt"
    return f"shorten the prompt to {max_context - 1} tokens or less"
