"""From token ids to text, one token at a time: pure.

A token is a run of bytes, and may end in the middle of a character. Each decoder gives the text
that is certain so far and holds back the rest, so that the pieces it gave, joined, are what the
tokenizer's own `decode` gives for all ids at once.
"""

import codecs
from collections.abc import Callable, Collection
from typing import Protocol

from tokenizer_workers.token_table import TokenTable

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 8  # a character has at most four bytes


class TextDecoder(Protocol):
    """The text of one sequence of tokens."""

    def push(self, token_id: int) -> str:
        """The text that this token completes, whole characters only."""

    def finish(self) -> str:
        """What was held back. Nothing is pushed afterwards."""


class ByteLevelDecoder:
    """For byte-level BPE, where the text is the joined bytes of all tokens, read as UTF-8.

    What is not UTF-8 becomes U+FFFD, one for each maximal part of a character.
    """

    __slots__ = ("_held", "_table", "_texts")

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._texts = table.texts
        self._held = b""

    def push(self, token_id: int) -> str:
        text = self._texts[token_id]
        if text is not None and not self._held:
            return text
        data = self._held + self._table.pieces[token_id]
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        return self._held.decode(errors="replace")


class ByteFallbackDecoder:
    """For SentencePiece vocabularies: tokens are text, and `<0x41>` is a byte.

    Bytes that are not UTF-8 become U+FFFD, one for each byte. A run of byte tokens that holds both
    whole characters and broken ones keeps the whole ones here, which may have been sent already;
    the tokenizer's own decoder gives up the run.

    strip    spaces to take from the start of the text, at most
    """

    __slots__ = ("_held", "_strip", "_table")

    def __init__(self, table: TokenTable, strip: int) -> None:
        self._table = table
        self._held = b""
        self._strip = strip

    def push(self, token_id: int) -> str:
        text = self._table.texts[token_id]
        if text is None:
            text, self._held = _whole_characters(self._held + self._table.pieces[token_id])
        elif text and self._held:
            text, self._held = REPLACEMENT * len(self._held) + text, b""
        return self._stripped(text) if self._strip else text

    def finish(self) -> str:
        return REPLACEMENT * len(self._held)

    def _stripped(self, text: str) -> str:
        kept = text
        while self._strip and kept.startswith(" "):
            kept = kept[1:]
            self._strip -= 1
        if kept:
            self._strip = 0
        return kept


class PrefixDecoder:
    """For any other tokenizer: decode the last few tokens with and without the newest ones.

    The tokens before them give the context that spaces depend on. Text that ends in U+FFFD may be
    the beginning of a character and is held back, for MAX_HELD_TOKENS at most.

    decode   ids -> text
    hidden   ids that add nothing to the text
    """

    __slots__ = ("_decode", "_hidden", "_ids", "_read", "_start")

    def __init__(self, decode: Callable[[list[int]], str], hidden: Collection[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._ids: list[int] = []
        self._start = 0  # _ids[_start:_read] is the context, and its text was given
        self._read = 0

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        given, text = self._texts()
        incomplete = len(text) <= len(given) or text.endswith(REPLACEMENT)
        if incomplete and len(self._ids) - self._read < MAX_HELD_TOKENS:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(given) :]

    def finish(self) -> str:
        given, text = self._texts()
        return text[len(given) :]

    def _texts(self) -> tuple[str, str]:
        context = self._ids[self._start : self._read]
        return self._decode(context), self._decode(self._ids[self._start :])


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """(text, rest): rest may be the beginning of a character; each broken byte is U+FFFD."""
    text = ""
    while True:
        try:
            whole, used = codecs.utf_8_decode(data, "strict", False)
            return text + whole, data[used:]
        except UnicodeDecodeError as error:
            text += data[: error.start].decode() + REPLACEMENT * (error.end - error.start)
            data = data[error.end :]
