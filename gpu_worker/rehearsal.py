"""Steps that nobody asked for, before the first that somebody did: what is compiled, tuned or
allocated when a kernel is first used keeps no request waiting.
"""

from collections.abc import Iterator

import msgspec
import numpy as np

from pipeline.messages import Logprobs, NewRow, Pooling, PoolingKind, Sampling, Step

SHORTEST = 16
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.0, top_p=0.9, seed=1, logit_bias=((0, -1.0),), watermark=True)
LOGPROBS = Logprobs(1, prompt_top=1)  # of those that are drawn
PREFILLED, DECODED = 0, 1  # rows
DECODED_TOKENS = 2


def lengths(most: int) -> list[int]:
    """Of prompts: kernels differ by the power of two, and by whether 16 divides the length."""
    powers = [SHORTEST << n for n in range(most.bit_length()) if SHORTEST << n <= most]
    odd = [length + length // 2 + 1 for length in powers]
    return sorted({1, *powers, *(length for length in odd if length <= most), most})


def steps(*, tokens: int, block_tokens: int, rows: int) -> Iterator[Step]:
    """Prefills of every length, with an adapter and without, each beside a row that decodes; the
    adapter is that of slot 0, whatever is there. Nothing sampled is fed again.

    tokens  the most of a step and of a sequence
    """
    for slot in (-1, 0):
        for number, length in enumerate(lengths(tokens - 1)):
            blocks = -(-length // block_tokens)
            sampling = DRAWN if number % 2 else GREEDY
            new = [_new_row(PREFILLED, slot, length, range(blocks), sampling)]
            if rows > DECODED:
                decoded = range(-(-DECODED_TOKENS // block_tokens))  # shared: nobody reads it
                new.append(_new_row(DECODED, slot, DECODED_TOKENS, decoded, sampling))
            yield Step(
                0,
                prefill=_ints([[PREFILLED, 0, length]]),
                decode_rows=_ints([DECODED] if rows > DECODED else []),
                new_rows=tuple(new),
            )
            yield Step(0, free_rows=_ints([one.row for one in new]))
    yield from _embeddings()


def _embeddings() -> Iterator[Step]:
    """One of each kind, a token long: which kernels make them depends on no length."""
    for kind in PoolingKind:
        new = _new_row(PREFILLED, -1, 1, range(1), GREEDY)
        new = msgspec.structs.replace(new, pooling=Pooling(kind))
        yield Step(0, prefill=_ints([[PREFILLED, 0, 1]]), new_rows=(new,))
        yield Step(0, free_rows=_ints([PREFILLED]))


def _new_row(row: int, slot: int, length: int, blocks: range, sampling: Sampling) -> NewRow:
    return NewRow(
        row=row,
        slot=slot,
        token_ids=_ints([0] * length),
        prompt_tokens=length,
        cached_tokens=0,
        blocks=_ints(blocks),
        sampling=sampling,
        logprobs=LOGPROBS if sampling is DRAWN else None,
    )


def _ints(values: object) -> bytes:
    return np.asarray(values, np.int32).tobytes()
