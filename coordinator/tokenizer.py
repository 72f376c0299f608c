"""Text to token ids and back, by the model directory's own tokenizer and chat template.

Runs in the coordinator, on threads beside its event loop: encoding and decoding go straight to the Rust tokenizer,
which never changes after loading. transformers only reads the directory and renders chat templates, and does both
without torch. Knows no request and no model limits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from echelon.chat import ChatMessage, ChatPrompt, ToolCall
from echelon.errors import ConfigError, InvalidRequestError

# What a client may hand to the template besides the names that only the template knows. Everything else that
# transformers takes by keyword (chat_template, tokenize, ...) is ours to say.
TEMPLATE_OPTIONS = ("add_generation_prompt", "continue_final_message", "documents")
_OURS = frozenset(
    {
        "conversation",
        "chat_template",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "messages",
        "tools",
    }
)
# What a template raises over messages and arguments that it was not written for.
_TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads at once.

    longest_token_characters: no token stands for more of a text.
    """

    def __init__(self, source: Any, directory: Path) -> None:
        self._source = source
        self._directory = directory
        self._rust = source.backend_tokenizer
        # Truncation and padding are the only state that encoding would write: without them threads can share it.
        self._rust.no_truncation()
        self._rust.no_padding()
        self.longest_token_characters = max(map(len, self._rust.get_vocab(with_added_tokens=True)))

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Reads tokenizer.json and its companions. Raises ConfigError naming the file."""
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{file} does not exist; Echelon needs the fast tokenizer of the model", field="model")
        from transformers import PreTrainedTokenizerFast  # a second of imports, so only where a model is served

        try:
            source = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the Rust parser raises bare Exception
            raise ConfigError(f"{file} cannot be read as a tokenizer: {error}", field="model") from error
        return cls(source, directory)

    @property
    def vocab_size(self) -> int:
        """Ids known by name, added tokens included; the model's own table may be padded beyond it."""
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of plain text, with the special tokens that the tokenizer puts around it (a BOS, for most models)."""
        return self._encode(text, special_tokens=True)

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Ids of a piece of text, and of nothing around it."""
        return self._encode(text, special_tokens=False)

    def _encode(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        """As a batch of one, for which the Rust tokenizer lets go of the interpreter: a long text takes seconds."""
        (encoding,) = self._rust.encode_batch_fast([text], add_special_tokens=special_tokens)
        return tuple(encoding.ids)

    def decode_long(self, ids: Sequence[int]) -> str:
        """As `decode`; it lets go of the interpreter, which costs more where there is little to decode."""
        (text,) = self._rust.decode_batch([list(ids)], skip_special_tokens=True)
        return str(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens. No spaces are cleaned up: more ids only ever add text."""
        return str(self._rust.decode(list(ids), skip_special_tokens=True))

    def chat(self, prompt: ChatPrompt) -> tuple[int, ...]:
        """Ids of a conversation in the model's chat format, up to where the assistant is to speak."""
        return self.encode_plain(self.chat_text(prompt))

    def chat_text(self, prompt: ChatPrompt) -> str:
        """What those ids spell, for `encode_plain`.

        The template writes its special tokens itself, a BOS too, so encoding adds none.
        """
        if self._source.chat_template is None:
            raise InvalidRequestError(
                f"the tokenizer in {self._directory.name} has no chat template; send text or token_ids instead",
                field="messages",
            )
        for name in prompt.template_args:
            if name in _OURS:
                raise InvalidRequestError(
                    f"template_args.{name} cannot be set; names of the template's own can, "
                    f"and {', '.join(TEMPLATE_OPTIONS)}",
                    field=f"template_args.{name}",
                )
        conversation = [_for_template(message) for message in prompt.messages]
        goes_on = bool(prompt.template_args.get("continue_final_message"))
        arguments = {"add_generation_prompt": not goes_on, **prompt.template_args, "tools": list(prompt.tools) or None}
        try:
            return str(self._source.apply_chat_template(conversation, tokenize=False, **arguments))
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", field="messages") from error


def _for_template(message: ChatMessage) -> dict[str, object]:
    """As templates expect it: OpenAI's form, but with a call's arguments as an object, where they are one."""
    told: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        told["tool_call_id"] = message.tool_call_id
    return told


def _arguments(call: ToolCall) -> object:
    try:
        return json.loads(call.arguments_json)
    except (ValueError, RecursionError):
        return call.arguments_json
