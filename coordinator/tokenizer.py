"""Text to token ids and back, by the model directory's own tokenizer and chat template.

Runs in the coordinator, on threads beside its event loop: encoding and decoding go straight to the Rust tokenizer,
which never changes after loading. transformers only reads the directory and renders chat templates, and does both
without torch. Knows no request and no model limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from echelon.errors import ConfigError, InvalidRequestError
from echelon.types import ChatMessage

# What a client may hand to the template besides the names that only the template knows. Everything else that
# transformers takes by keyword (chat_template, tokenize, ...) is ours to say.
TEMPLATE_OPTIONS = ("add_generation_prompt", "continue_final_message", "tools", "documents")
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
    }
)


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads at once."""

    def __init__(self, source: Any, directory: Path) -> None:
        self._source = source
        self._directory = directory
        self._rust = source.backend_tokenizer
        # Truncation and padding are the only state that encoding would write: without them threads can share it.
        self._rust.no_truncation()
        self._rust.no_padding()

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
        return tuple(self._rust.encode(text, add_special_tokens=True).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens. No spaces are cleaned up: more ids only ever add text."""
        return str(self._rust.decode(list(ids), skip_special_tokens=True))

    def chat(self, messages: Sequence[ChatMessage], template_args: Mapping[str, object]) -> tuple[int, ...]:
        """Ids of a conversation in the model's chat format, up to where the assistant is to speak.

        The template writes its special tokens itself, a BOS too, so encoding adds none.
        """
        if self._source.chat_template is None:
            raise InvalidRequestError(
                f"the tokenizer in {self._directory.name} has no chat template; send text or token_ids instead",
                field="messages",
            )
        for name in template_args:
            if name in _OURS:
                raise InvalidRequestError(
                    f"template_args.{name} cannot be set; names of the template's own can, "
                    f"and {', '.join(TEMPLATE_OPTIONS)}",
                    field=f"template_args.{name}",
                )
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        arguments = {"add_generation_prompt": True, **template_args}
        try:
            text = self._source.apply_chat_template(conversation, tokenize=False, **arguments)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", field="messages") from error
        return tuple(self._rust.encode(text, add_special_tokens=False).ids)
