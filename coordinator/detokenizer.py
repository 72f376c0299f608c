"""Token ids to text, a piece at a time, for one stream.

Lives in the coordinator, pure. The text after k ids is a function of those ids alone, however they were cut into
pushes, so a re-attached stream continues exactly. Bytes of an unfinished character are held back until the ids that
finish it, or `flush`. Knows the tokenizer only as `decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
UNFINISHED = REPLACEMENT * 3  # at most three bytes wait for a fourth, and show as one to three of these
WINDOW_IDS = 12  # decoded together; what comes before is settled
CONTEXT_IDS = 4  # kept when the window moves on, for decoders that treat an answer's first id apart


class Detokenizer:
    """Incremental decoding. The pushed pieces and the flush together are decode(all ids)."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._text = ""  # of the window
        self._told = 0  # characters of _text that were handed out

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids settle."""
        return "".join([self._push(token_id) for token_id in ids])

    def flush(self) -> str:
        """What was held back, when no more ids will come."""
        piece, self._told = self._text[self._told :], len(self._text)
        return piece

    def _push(self, token_id: int) -> str:
        if len(self._window) >= WINDOW_IDS and not self._text.endswith(REPLACEMENT):
            self._move_window()
        self._window.append(token_id)
        self._text = text = self._decode(self._window)
        settled = len(text)
        if text.endswith(REPLACEMENT):
            settled -= len(text) - max(len(text.rstrip(REPLACEMENT)), len(text) - len(UNFINISHED))
        told = self._told
        self._told = max(told, settled)
        return text[told:settled]

    def _move_window(self) -> None:
        """Start it anew at the last few ids; called between characters, so nothing is being held back."""
        context = self._window[-CONTEXT_IDS:]
        text = self._decode(context)
        if not text.endswith(REPLACEMENT):
            self._window, self._text, self._told = context, text, len(text)
