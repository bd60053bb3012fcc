"""What clients are told of single tokens: text, log-probability, and what might stand there."""

from array import array
from collections.abc import Callable

from pipeline.logprobs import unpack
from pipeline.messages import Alternative, Logprobs, TokenDetail
from tokenizer_workers.decode import TextDecoder


class Vocabulary:
    """What is to be told of each token, wherever it stands.

    bytes_of     of a token id: its own bytes
    special_ids  tokens that are not text
    """

    def __init__(self, bytes_of: Callable[[int], bytes], special_ids: frozenset[int]) -> None:
        self._bytes_of = bytes_of
        self.special_ids = special_ids

    def detail(self, token_id: int, text: str, row: bytes | None, top: int) -> TokenDetail:
        """row is of pipeline.logprobs, if there is one."""
        data = self._bytes_of(token_id)
        logprob: float | None = None
        alternatives: tuple[Alternative, ...] = ()
        if row is not None:
            logprob, likeliest = unpack(row, top)
            alternatives = tuple(
                self._alternative(*one) for one in _own_first(token_id, logprob, likeliest)
            )
        return TokenDetail(
            id=token_id,
            text=text,
            logprob=logprob,
            special=token_id in self.special_ids,
            alternatives=alternatives,
            data=None if text.encode() == data else data,
        )

    def _alternative(self, token_id: int, logprob: float) -> Alternative:
        data = self._bytes_of(token_id)
        text = data.decode(errors="replace")
        return Alternative(token_id, text, logprob, None if text.encode() == data else data)


class PromptTokens:
    """The tokens of a prompt, while their log-probabilities come in.

    token_ids  int32[n]
    """

    def __init__(self, token_ids: bytes, wanted: Logprobs) -> None:
        assert wanted.prompt_top is not None
        self._token_ids = array("i", token_ids)
        self._top = wanted.prompt_top
        self._rows: list[bytes] = []

    def add(self, rows: list[bytes]) -> None:
        """Of the next tokens, from the second on."""
        self._rows += rows

    @property
    def complete(self) -> bool:
        return len(self._rows) == len(self._token_ids) - 1

    def details(self, vocabulary: Vocabulary, decoder: TextDecoder) -> tuple[TokenDetail, ...]:
        """Once it is complete. Nothing comes before the first token, which has no probability."""
        rows: list[bytes | None] = [None, *self._rows]
        return tuple(
            vocabulary.detail(token_id, decoder.push(token_id), row, self._top)
            for token_id, row in zip(self._token_ids, rows, strict=True)
        )


def _own_first(
    token_id: int, logprob: float, likeliest: list[tuple[int, float]]
) -> list[tuple[int, float]]:
    """Among tokens that are equally likely, those that were found are any: be it this one first."""
    if not likeliest or logprob < likeliest[-1][1]:
        return likeliest
    others = [one for one in likeliest if one[0] != token_id]
    place = sum(value > logprob for _, value in others)
    return [*others[:place], (token_id, logprob), *others[place:]][: len(likeliest)]
