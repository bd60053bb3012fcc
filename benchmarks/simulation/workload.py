"""The requests of a scenario: who asks when, for which adapter, and how much.

After the generator of S-LoRA (Sheng et al., arXiv:2311.03285, section 7.1): the popularity of
adapters falls by a power law, the times between arrivals have a gamma distribution with a given
coefficient of variation, lengths are uniform in a range. Adapter i of n belongs to tenant i mod t.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

PROMPT_TOKENS = (8, 512)  # both ends included
OUTPUT_TOKENS = (8, 512)
VARIATION = 2.0  # of the times between arrivals: standard deviation over mean


class Request(NamedTuple):
    arrival: float  # seconds
    tenant: str
    adapter: str
    prompt_tokens: int
    output_tokens: int


class Stream(NamedTuple):
    """Requests of some tenants for their adapters.

    tenants   names; adapter i is of tenant i mod their number
    adapters  how many
    alpha     the i-th, from 1, is asked for in proportion to i ** -alpha
    rate      requests per second while it sends
    sends     of each period of so many seconds, the first so many: (period, seconds); None: always
    """

    tenants: tuple[str, ...]
    adapters: int
    alpha: float
    rate: float
    sends: tuple[float, float] | None = None

    @property
    def mean_rate(self) -> float:
        return self.rate if self.sends is None else self.rate * self.sends[1] / self.sends[0]


class Scenario(NamedTuple):
    name: str
    share: float  # of all requests
    streams: tuple[Stream, ...]
    suspects: tuple[str, ...] = ()  # the tenants that the others are victims of


TENANTS = 20
OTHERS = tuple(f"tenant {number}" for number in range(1, TENANTS))


def scenarios(capacity: float) -> list[Scenario]:
    """capacity: requests per second that the device can take, about."""
    everybody = (*OTHERS, "tenant 20")
    bursts = Stream(("bursty",), 100, 1.0, capacity, sends=(60.0, 10.0))
    flood = Stream(("flooder",), 500, 0.0, 1.5 * capacity)
    bursty = (Stream(OTHERS, 1900, 1.0, 0.6 * capacity), bursts)
    adversarial = (Stream(OTHERS, 1500, 1.0, 0.5 * capacity), flood)
    return [
        Scenario("steady", 0.25, (Stream(everybody, 2000, 1.0, 0.95 * capacity),)),
        Scenario("bursty", 0.35, bursty, ("bursty",)),
        Scenario("adversarial", 0.35, adversarial, ("flooder",)),
        Scenario("saturated", 0.05, (Stream(everybody, 2000, 1.0, 1.5 * capacity),)),
    ]


def requests(scenario: Scenario, count: int, seed: int = 0) -> list[Request]:
    """About `count` of them, in order of arrival."""
    generator = np.random.default_rng(seed)
    seconds = count / sum(stream.mean_rate for stream in scenario.streams)
    found = [one for stream in scenario.streams for one in _stream(stream, seconds, generator)]
    return sorted(found, key=lambda request: request.arrival)


def _stream(stream: Stream, seconds: float, generator: np.random.Generator) -> Iterator[Request]:
    count = int(stream.mean_rate * seconds)
    shape = VARIATION**-2
    arrivals = np.cumsum(generator.gamma(shape, 1 / (shape * stream.rate), count))
    if stream.sends is not None:
        period, sending = stream.sends
        arrivals = arrivals // sending * period + arrivals % sending
    popularity = np.arange(1, stream.adapters + 1) ** -stream.alpha
    adapters = generator.choice(stream.adapters, count, p=popularity / popularity.sum())
    prompts = generator.integers(*PROMPT_TOKENS, count, endpoint=True)
    outputs = generator.integers(*OUTPUT_TOKENS, count, endpoint=True)
    tenants = stream.tenants
    for arrival, adapter, prompt, output in zip(
        arrivals.tolist(), adapters.tolist(), prompts.tolist(), outputs.tolist(), strict=True
    ):
        tenant = tenants[adapter % len(tenants)]
        yield Request(arrival, tenant, f"{tenant}/{adapter}", prompt, output)
