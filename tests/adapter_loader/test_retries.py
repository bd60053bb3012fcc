"""How often, and how long apart, a thing is tried."""

from collections.abc import Callable

import pytest

from adapter_loader.remote.retries import FIRST_SECONDS, LONGEST_SECONDS, Interrupted, Retries
from pipeline.errors import RequestError


class World:
    """A clock that moves only by sleeping."""

    def __init__(self, tries: int = 8, seconds: float = 1000) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.tried = 0
        self.retries = Retries(
            tries=tries,
            seconds=seconds,
            clock=lambda: self.now,
            sleep=self.sleep,
            uniform=lambda least, most: most,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)

    def run(self, *errors: Exception) -> str:
        left = list(errors)

        def job() -> str:
            self.tried += 1
            if left:
                raise left.pop(0)
            return "done"

        return self.retries.run(job, self.retries.deadline())


def test_what_goes_well_is_done_once() -> None:
    world = World()
    assert (world.run(), world.tried, world.waits) == ("done", 1, [])


def test_waits_double_up_to_a_bound() -> None:
    world = World()
    assert world.run(*[Interrupted("away")] * 7) == "done"
    assert world.waits[:2] == [FIRST_SECONDS, 2 * FIRST_SECONDS]
    assert world.waits[-1] == LONGEST_SECONDS
    assert world.waits == sorted(world.waits)


def test_the_last_try_tells_its_reason() -> None:
    world = World(tries=3)
    with pytest.raises(RequestError, match="third") as caught:
        world.run(Interrupted("first"), Interrupted("second"), Interrupted("third"))
    assert (caught.value.status, world.tried, len(world.waits)) == (503, 3, 2)


@pytest.mark.parametrize(
    "error", [RequestError(404, "adapter_not_found", "gone"), KeyError("a defect of ours")]
)
def test_what_will_not_pass_is_not_tried_again(error: Exception) -> None:
    world = World()
    with pytest.raises(type(error)):
        world.run(error)
    assert world.tried == 1


def test_the_other_side_may_ask_for_a_longer_wait() -> None:
    world = World()
    world.run(Interrupted("busy", seconds=20))
    assert world.waits == [20]


@pytest.mark.parametrize("error", [lambda: Interrupted("busy", 60), lambda: Interrupted("away")])
def test_no_wait_goes_beyond_the_time_there_is(error: Callable[[], Interrupted]) -> None:
    world = World(tries=1000, seconds=30)
    with pytest.raises(RequestError):
        world.run(*[error() for _ in range(1000)])
    assert world.now < 30
