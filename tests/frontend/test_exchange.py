"""Bodies are read up to a limit, and no further."""

from collections.abc import Iterable
from typing import Any

import pytest

from frontend.exchange import BodyTooLarge, ClientGone, header, is_json, read_body

pytestmark = pytest.mark.anyio


class Incoming:
    """An ASGI receive; counts what was taken of it."""

    def __init__(self, parts: Iterable[bytes], *, breaks_off: bool = False) -> None:
        parts = list(parts)
        self._messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": part, "more_body": at < len(parts) - 1 or breaks_off}
            for at, part in enumerate(parts)
        ]
        if breaks_off:
            self._messages.append({"type": "http.disconnect"})
        self.taken = 0

    async def __call__(self) -> dict[str, Any]:
        self.taken += 1
        return self._messages[self.taken - 1]


def scope(**headers: str) -> dict[str, Any]:
    return {
        "headers": [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ]
    }


async def test_a_body_is_put_together() -> None:
    assert await read_body(scope(), Incoming([b"ab", b"", b"c"]), 3) == b"abc"


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    incoming = Incoming([b"abcd"])
    with pytest.raises(BodyTooLarge):
        await read_body(scope(content_length="4"), incoming, 3)
    assert incoming.taken == 0


async def test_a_body_that_turns_out_too_large_is_not_read_on() -> None:
    incoming = Incoming([b"ab", b"cd", b"ef"])
    with pytest.raises(BodyTooLarge):
        await read_body(scope(), incoming, 3)
    assert incoming.taken == 2


async def test_a_client_that_goes_while_it_sends_is_gone() -> None:
    with pytest.raises(ClientGone):
        await read_body(scope(), Incoming([b"ab"], breaks_off=True), 100)


@pytest.mark.parametrize(
    ("content_type", "json"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/problem+json", True),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
        ("", False),
        (None, False),
    ],
)
async def test_json_is_told_by_its_content_type(content_type: str | None, json: bool) -> None:
    assert is_json(content_type) == json


async def test_a_header_is_found_by_its_name() -> None:
    assert header(scope(authorization="Bearer x"), b"authorization") == "Bearer x"
    assert header(scope(), b"authorization") is None
