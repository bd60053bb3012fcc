"""Log-probabilities as they travel from the device to where tokens become text: pure.

A row belongs to one token. It is 1 + 2 * top numbers of four bytes: the token's log-probability
(float32), the ids of the likeliest tokens at its place, likeliest first (int32), and their
log-probabilities (float32). Nobody between the two ends has to know how long rows are: there is a
whole number of them in a message, and those of a message are equally long.
"""

from array import array

ITEM_BYTES = 4


def split(rows: bytes, count: int) -> list[bytes]:
    """The rows one by one. Raises ValueError if they are not so many."""
    size, rest = divmod(len(rows), count) if count else (0, len(rows))
    if rest or (count and size % (2 * ITEM_BYTES) != ITEM_BYTES):
        raise ValueError(f"{len(rows)} bytes are not {count} rows of log-probabilities")
    return [rows[start : start + size] for start in range(0, len(rows), size or 1)]


def unpack(row: bytes, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The token's own log-probability; ids and log-probabilities of the `top` likeliest.

    The row may have more of them, which a neighbour wanted, or fewer: a whole vocabulary.
    """
    floats, ids = array("f", row), array("i", row)
    width = len(ids) // 2
    count = min(top, width)
    values = floats[1 + width : 1 + width + count]
    return floats[0], list(zip(ids[1 : 1 + count], values, strict=True))


def pack(logprob: float, likeliest: list[tuple[int, float]]) -> bytes:
    """The row that `unpack` takes apart."""
    ids = array("i", [one for one, _ in likeliest])
    values = array("f", [value for _, value in likeliest])
    return array("f", [logprob]).tobytes() + ids.tobytes() + values.tobytes()
