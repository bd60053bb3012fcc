"""What a step costs: how long it takes, from what is in it and from steps that were measured.

A step reads the weights once, the KV of what its rows attend to, and each distinct adapter; every
token is computed. The constants are those of Llama-3.1-8B in bf16 on an H200, see
docs/performance.md. Another model or device is faster or slower by two factors, one for what a step
costs that decodes and one for the tokens of its prompts; both follow what is measured.
"""

from typing import NamedTuple

FIXED_SECONDS = 4.3e-3  # the weights, and all launches
ROW_SECONDS = 8e-6
KV_TOKEN_SECONDS = 3.3e-8  # 128 KiB at 4 TB/s
ADAPTER_BYTE_SECONDS = 3.7e-13  # 31 us for one of rank 16, 84 MB
PROMPT_TOKEN_SECONDS = 2.2e-5

LEARNED_TOKENS = 16  # chunks of fewer say nothing about the cost of a token
LEARNING_RATE = 0.2
MAX_SURPRISE = 4.0  # a step that takes longer than so many times what it should counts as that


class Work(NamedTuple):
    """What is in a step."""

    rows: int  # that decode
    kv_tokens: int  # that these attend to
    adapter_bytes: int  # of the distinct adapters of all that run
    prompt_tokens: int  # in chunks

    def decode_seconds(self) -> float:
        return (
            FIXED_SECONDS
            + ROW_SECONDS * self.rows
            + KV_TOKEN_SECONDS * self.kv_tokens
            + ADAPTER_BYTE_SECONDS * self.adapter_bytes
        )

    def prompt_seconds(self) -> float:
        return PROMPT_TOKEN_SECONDS * self.prompt_tokens


class StepCost:
    """The cost of steps on this machine."""

    def __init__(self) -> None:
        self._decode_factor: float | None = None  # until one has been measured
        self._prompt_factor: float | None = None

    def seconds(self, work: Work) -> float:
        """How long this step will take; nothing is known before some have been measured."""
        return (self._decode_factor or 0.0) * work.decode_seconds() + (
            self._prompt_factor or 0.0
        ) * work.prompt_seconds()

    def prompt_tokens_within(self, seconds: float, work: Work) -> int | None:
        """How many tokens of prompts a step can have beside `work` to take so long; None: any.

        At least as much time as its decode rows take is left for prompts, so that these go on
        whatever is asked for.
        """
        if self._prompt_factor is None:
            return None
        decode_seconds = (self._decode_factor or 0.0) * work.decode_seconds()
        left = max(seconds - decode_seconds, decode_seconds)
        return max(int(left / (self._prompt_factor * PROMPT_TOKEN_SECONDS)), LEARNED_TOKENS)

    def learn(self, work: Work, seconds: float) -> None:
        """A step with this work has taken so long."""
        if seconds <= 0:
            return
        if not work.prompt_tokens:
            self._decode_factor = _follow(self._decode_factor, seconds / work.decode_seconds())
        elif work.prompt_tokens >= LEARNED_TOKENS:
            rest = seconds - (self._decode_factor or 0.0) * work.decode_seconds()
            factor = max(rest, 0.1 * seconds) / work.prompt_seconds()
            self._prompt_factor = _follow(self._prompt_factor, factor)


def _follow(factor: float | None, measured: float) -> float:
    """A geometric moving average: a step that was held up once moves it little."""
    if factor is None:
        return measured
    surprise = min(max(measured / factor, 1 / MAX_SURPRISE), MAX_SURPRISE)
    return factor * float(surprise**LEARNING_RATE)
