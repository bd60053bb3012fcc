"""Replies that follow a grammar, by a model whose logits are random: no model at all."""

from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

POOL = 16  # logits that are drawn once
MAX_TOKENS = 300
TRIES = 8  # some texts, such as addresses, are rarely ended by chance


class RandomModel:
    """Draws tokens at random among those that a matcher allows. What ends things becomes likelier
    with each token, so that replies end."""

    def __init__(self, vocabulary: LLTokenizer, seed: int) -> None:
        self._vocabulary = vocabulary
        self._eos = frozenset(vocabulary.eos_tokens)
        self._generator = np.random.default_rng(seed)
        self._logits = self._generator.standard_normal((POOL, vocabulary.vocab_size))
        self._closing = np.array(
            [self._ends(token) for token in range(vocabulary.vocab_size)], np.float64
        )

    def _ends(self, token: int) -> int:
        """How much a token helps to end a JSON text, and the first part of an address."""
        if token in self._eos:
            return 3
        characters = set(self._vocabulary.decode_str([token]))
        if not characters or characters - set('"]}@'):
            return 0
        return 3 if characters in ({'"'}, {"@"}) else 2

    def whole_reply(self, matcher: LLMatcher) -> tuple[str, bool]:
        """A reply from the beginning of the grammar, which is left there, as it is from `reply`."""
        for _ in range(TRIES):
            text, is_whole = self.reply(matcher.deep_copy())
            if is_whole:
                break
        return text, is_whole

    def reply(self, matcher: LLMatcher) -> tuple[str, bool]:
        """The text, and whether it has come to its end."""
        tokens: list[int] = []
        while len(tokens) < MAX_TOKENS:
            token = self._next(matcher, len(tokens))
            if token in self._eos:
                return self._vocabulary.decode_str(tokens), True
            tokens.append(token)
            assert matcher.consume_token(token), matcher.get_error()
        return self._vocabulary.decode_str(tokens), False

    def _next(self, matcher: LLMatcher, length: int) -> int:
        allowed = allowed_tokens(matcher)
        assert not matcher.is_error(), matcher.get_error()
        logits: Any = self._logits[self._generator.integers(POOL)]
        wants_to_end = length / 5 * (self._generator.random() < 0.7)
        scores = logits[allowed] + wants_to_end * self._closing[allowed]
        return int(allowed[scores.argmax()])


def allowed_tokens(matcher: LLMatcher) -> Any:
    octets = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little"))
