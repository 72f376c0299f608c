"""From what a client sent to a request that is ready to run: checks, defaults, prompt ids, digest.

Runs in the coordinator, off its event loop (tokenising takes time). A pure function of its arguments: ids and seeds
are drawn by the caller, and no journal, queue or transport is known here.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field

from coordinator.model_facts import ModelFacts, check_model, check_vocabulary
from coordinator.requests.nouns import Received, Request
from coordinator.settle import Served, settle_sampling
from coordinator.tokenizer import Tokenizer
from echelon.chat import ChatPrompt
from echelon.errors import InvalidRequestError
from echelon.sampling import SamplingParams

DEFAULT_TIMEOUT_S = 600.0
JOB_PREFIX = "job."
MAX_SALT_CHARACTERS = 256
MAX_MESSAGES = 10_000
MAX_PROMPT_LOGPROBS = 3_000_000  # they travel in one message, 15 bytes each
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")


Prompt = str | tuple[int, ...] | ChatPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateFields:
    """What a client sent, untouched. Empty strings and None are fields it left unset."""

    prompt: Prompt | None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""
    request_id: str = ""
    deadline_unix_s: float | None = None
    priority: int = 0
    cache_salt: str = ""


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


def check_received(received: Received, facts: ModelFacts) -> None:
    """Refuses ids that no answer of this model can hold: a client says that it got them, and they are computed on."""
    for choice, ids in enumerate(received):
        check_vocabulary(ids, facts, f"resume.received[{choice}]")


def resolve(fields: GenerateFields, served: Served, now: float, drawn_seed: int, drawn_id: str) -> Request:
    """The request to run. drawn_seed and drawn_id fill what the client left open.

    Raises InvalidRequestError or NotFoundError naming the field.
    """
    facts = served.facts
    check_model(fields.model, facts)
    if len(fields.cache_salt) > MAX_SALT_CHARACTERS:
        raise InvalidRequestError(
            f"cache_salt has {len(fields.cache_salt)} characters, over the limit of {MAX_SALT_CHARACTERS}",
            field="cache_salt",
        )
    prompt = prompt_ids(fields.prompt, served, facts.max_context)
    sampling = settle_sampling(fields.sampling, served, drawn_seed)
    wanted = len(prompt) + sampling.max_tokens
    if wanted > facts.max_context:
        raise InvalidRequestError(
            f"{len(prompt)} prompt tokens + max_tokens={sampling.max_tokens} = {wanted}, over max_context="
            f"{facts.max_context} of {facts.name!r}; {_context_remedy(len(prompt), facts.max_context)}",
            reason="CONTEXT_TOO_LONG",
            field="sampling.max_tokens" if len(prompt) < facts.max_context else "prompt",
        )
    _check_scores(len(prompt), sampling.prompt_logprobs)
    deadline = now + DEFAULT_TIMEOUT_S if fields.deadline_unix_s is None else fields.deadline_unix_s
    return Request(
        request_id=fields.request_id or drawn_id,
        digest=digest_of(fields),
        model=facts.name,
        prompt=prompt,
        sampling=sampling,
        deadline_unix_s=deadline,
        opened_unix_s=now,
        priority=fields.priority,
        cache_salt=fields.cache_salt,
    )


def digest_of(fields: GenerateFields) -> bytes:
    """SHA-256 of the content as it was sent: neither the id, nor the deadline, nor anything the server filled in."""
    prompt = asdict(fields.prompt) if isinstance(fields.prompt, ChatPrompt) else fields.prompt
    content = {
        "model": fields.model,
        "prompt": prompt,
        "sampling": asdict(fields.sampling),
        "priority": fields.priority,
        "cache_salt": fields.cache_salt,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def prompt_ids(prompt: Prompt | None, served: Served, most_tokens: int | None = None) -> tuple[int, ...]:
    """The ids that the model is given. Raises InvalidRequestError naming the field.

    most_tokens: a text that cannot have so few is not looked at; what has more ids may pass.
    """
    ids = _encode(prompt, served.tokenizer, most_tokens)
    check_vocabulary(ids, served.facts, "token_ids" if isinstance(prompt, tuple) else "text")
    return ids


def _encode(prompt: Prompt | None, tokenizer: Tokenizer, most_tokens: int | None) -> tuple[int, ...]:
    if prompt is None:
        raise InvalidRequestError("the request has no input; set one of text, token_ids or messages", field="prompt")
    if isinstance(prompt, ChatPrompt):
        if not prompt.messages:
            raise InvalidRequestError("messages is empty; send at least one message", field="messages")
        if len(prompt.messages) > MAX_MESSAGES:
            raise InvalidRequestError(
                f"messages has {len(prompt.messages)}, over the limit of {MAX_MESSAGES}", field="messages"
            )
        for place, message in enumerate(prompt.messages):
            if not message.role:
                raise InvalidRequestError(f"messages[{place}] has no role; set one, such as 'user'", field="messages")
        text = tokenizer.chat_text(prompt)
        _check_length(text, tokenizer, most_tokens)
        ids = tokenizer.encode_plain(text)
    elif isinstance(prompt, str):
        if not prompt:
            raise InvalidRequestError("text is empty; send at least one character", field="text")
        _check_length(prompt, tokenizer, most_tokens)
        ids = tokenizer.encode(prompt)
    else:
        ids = prompt
    if not ids:
        raise InvalidRequestError("the prompt has no tokens; send at least one", field="prompt")
    return ids


def _check_scores(prompt_tokens: int, prompt_logprobs: int | None) -> None:
    """What could not be told would be computed again and again."""
    count = 0 if prompt_logprobs is None else prompt_tokens * (prompt_logprobs + 1)
    if count > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"{prompt_tokens} prompt tokens x (1 + prompt_logprobs={prompt_logprobs}) = {count} log-probabilities, "
            f"over the limit of {MAX_PROMPT_LOGPROBS}; ask for fewer, or shorten the prompt",
            field="sampling.prompt_logprobs",
        )


def _check_length(text: str, tokenizer: Tokenizer, most_tokens: int | None) -> None:
    if most_tokens is None:
        return
    longest = tokenizer.longest_token_characters
    if len(text) > most_tokens * longest:
        raise InvalidRequestError(
            f"the prompt has {len(text)} characters, over max_context={most_tokens} tokens of at most {longest} "
            f"characters, {most_tokens * longest}; shorten it",
            reason="CONTEXT_TOO_LONG",
            field="prompt",
        )


def _context_remedy(prompt_tokens: int, max_context: int) -> str:
    room = max_context - prompt_tokens
    if room >= 1:
        return f"set max_tokens to {room} or less, or shorten the prompt"
    return f"shorten the prompt to {max_context - 1} tokens or less"
