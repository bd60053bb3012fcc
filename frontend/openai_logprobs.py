"""Log-probabilities as OpenAI writes them: in chats by token, in completions as parallel lists."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from pipeline.messages import Alternative, TokenDetail


class LogprobsShape(Protocol):
    """What stands in `logprobs` of a choice. One object per choice; it may keep state."""

    def of(self, tokens: Sequence[TokenDetail]) -> dict[str, Any]:
        """What follows those that were written before."""
        ...


class ChatLogprobs:
    """`logprobs.content` of a chat: the tokens of its content, whose bytes joined are the content.

    What is not in the content, such as the end of the turn, is not here either; but for calls of
    tools, of which the tokens are here that the model wrote them with.
    """

    def of(self, tokens: Sequence[TokenDetail]) -> dict[str, Any]:
        content = [
            {**_token(one), "top_logprobs": [_token(other) for other in one.alternatives]}
            for one in tokens
            if not one.special
        ]
        return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`logprobs` of a completion: all tokens, its end among them, with where in the choice's text
    they begin.

    top  likeliest tokens beside each; the token itself comes on top of them if it is none
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._offset = 0

    def of(self, tokens: Sequence[TokenDetail]) -> dict[str, Any]:
        return {
            "tokens": [_text(one, "bytes:") for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [self._likeliest(one) for one in tokens] if self._top else None,
            "text_offset": list(self._offsets(tokens)),
        }

    def _offsets(self, tokens: Sequence[TokenDetail]) -> Iterable[int]:
        for one in tokens:
            yield self._offset
            if not one.special:
                self._offset += len(one.text)

    def _likeliest(self, token: TokenDetail) -> dict[str, float] | None:
        """By text: of two tokens with the same, the likelier counts."""
        if token.logprob is None:
            return None
        likeliest: dict[str, float] = {}
        for one in token.alternatives:
            likeliest.setdefault(_text(one, "bytes:"), one.logprob)
        likeliest.setdefault(_text(token, "bytes:"), token.logprob)
        return likeliest


def _token(one: TokenDetail | Alternative) -> dict[str, Any]:
    data = one.text.encode() if one.data is None else one.data
    return {"token": _text(one, ""), "logprob": one.logprob, "bytes": list(data)}


def _text(one: TokenDetail | Alternative, prefix: str) -> str:
    r"""The token's own text; of one that is not whole characters, its bytes as `\xf0\x9f`."""
    if one.data is None:
        return one.text
    try:
        return one.data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in one.data)
