"""What each token of a vocabulary adds to the text, worked out once: pure."""

from collections.abc import Collection, Sequence
from typing import Any


class TokenTable:
    """What each token id adds to the text.

    texts    [vocabulary]  the token's text; None when its bytes are not whole characters
    pieces   [vocabulary]  the token's bytes

    An id that has no token adds nothing.
    """

    __slots__ = ("pieces", "texts")

    def __init__(self, texts: Sequence[str | None], pieces: Sequence[bytes]) -> None:
        self.texts = texts
        self.pieces = pieces

    def bytes_of(self, token_id: int) -> bytes:
        text = self.texts[token_id]
        return self.pieces[token_id] if text is None else text.encode()


def byte_level_table(tokens: Sequence[str | None], hidden: Collection[int]) -> TokenTable:
    """The table of a vocabulary whose tokens are written in the byte alphabet of GPT-2.

    tokens   [vocabulary]  None where an id has no token
    hidden   ids that add nothing to the text
    """
    byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
    texts: list[str | None] = []
    pieces: list[bytes] = []
    for token_id, token in enumerate(tokens):
        if token is None or token_id in hidden:
            piece = b""
        else:
            try:
                piece = bytes([byte_of[character] for character in token])
            except KeyError:  # an added token, written as it is
                piece = token.encode()
        pieces.append(piece)
        texts.append(_text_of(piece))
    return TokenTable(texts, pieces)


def byte_fallback_table(
    tokens: Sequence[str | None], hidden: Collection[int], replace: Sequence[tuple[str, str]]
) -> TokenTable:
    """The table of a SentencePiece vocabulary.

    replace   (what, with) for each token's text, as `_` (U+2581) with a space
    """
    texts: list[str | None] = []
    pieces: list[bytes] = []
    for token_id, token in enumerate(tokens):
        text: str | None = "" if token is None or token_id in hidden else token
        piece = b""
        for what, by in replace:
            text = text.replace(what, by) if text else text
        if text and (byte := _byte_token(text)) is not None:
            text, piece = None, bytes([byte])
        texts.append(text)
        pieces.append(piece)
    return TokenTable(texts, pieces)


def fallback_decoder_config(config: Any) -> tuple[list[tuple[str, str]], int] | None:
    """(replace, strip) when a tokenizer.json's decoder is the usual one of SentencePiece.

    That is a sequence of Replace..., ByteFallback, Fuse and perhaps Strip, in this order.
    """
    if not isinstance(config, dict) or config.get("type") != "Sequence":
        return None
    steps = list(config["decoders"])
    replace = []
    while steps and steps[0]["type"] == "Replace":
        step = steps.pop(0)
        if "String" not in step["pattern"]:
            return None
        replace.append((step["pattern"]["String"], step["content"]))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteFallback", "Fuse"]:
        return replace, 0
    if kinds == ["ByteFallback", "Fuse", "Strip"]:
        strip = steps[-1]
        if strip["content"] == " " and strip["stop"] == 0:
            return replace, strip["start"]
    return None


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(0x100 + len(alphabet) - len(printable))
    return [alphabet[byte] for byte in range(256)]


def _text_of(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _byte_token(token: str) -> int | None:
    """0x41 for `<0x41>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None
