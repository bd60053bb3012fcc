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
        return Alternative(
            id=token_id,
            text=text,
            logprob=logprob,
            data=None if text.encode() == data else data,
            special=token_id in self.special_ids,
        )


class PromptTokens:
    """The tokens of a prompt, while their log-probabilities come in.

    They are written down as they come: a long prompt has many, for which others would wait.

    token_ids  int32[n]
    decoder    of their texts, which nobody else uses
    """

    def __init__(
        self, token_ids: bytes, wanted: Logprobs, vocabulary: Vocabulary, decoder: TextDecoder
    ) -> None:
        assert wanted.prompt_top is not None
        self._token_ids = array("i", token_ids)
        self._top = wanted.prompt_top
        self._vocabulary = vocabulary
        self._decoder = decoder
        self.details: list[TokenDetail] = []
        self._add(None)  # nothing comes before the first token, which has no probability

    def add(self, rows: list[bytes]) -> None:
        """Of the next tokens, from the second on."""
        for row in rows:
            self._add(row)

    @property
    def complete(self) -> bool:
        return len(self.details) == len(self._token_ids)

    def _add(self, row: bytes | None) -> None:
        token_id = self._token_ids[len(self.details)]
        text = self._decoder.push(token_id)
        self.details.append(self._vocabulary.detail(token_id, text, row, self._top))


def _own_first(
    token_id: int, logprob: float, likeliest: list[tuple[int, float]]
) -> list[tuple[int, float]]:
    """Among tokens that are equally likely, those that were found are any: be it this one first."""
    if not likeliest or logprob < likeliest[-1][1]:
        return likeliest
    others = [one for one in likeliest if one[0] != token_id]
    place = sum(value > logprob for _, value in others)
    return [*others[:place], (token_id, logprob), *others[place:]][: len(likeliest)]
