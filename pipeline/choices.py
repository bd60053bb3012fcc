"""Several replies to one prompt: their requests' ids and their seeds.

A prompt with `choices` replies has as many requests, whose ids follow each other from its own on.
Their seeds are as different as any: the first choice has the one that was given, so that it says
what a lone reply with that seed says.
"""

SEEDS = 1 << 64
STRIDE = 0x9E3779B97F4A7C15  # odd, so that it takes 2**64 choices to come to a seed again


def request_ids(first: int, choices: int) -> range:
    return range(first, first + choices)


def seed_of(seed: int, choice: int) -> int:
    """Of choice 0, 1, ...; uint64."""
    return (seed + choice * STRIDE) % SEEDS
