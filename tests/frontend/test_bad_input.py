"""A request that cannot be served: its status, and the error in the shape of its route."""

import json
from typing import Any

import pytest

from pipeline.messages import FailureKind
from tests.frontend.fakes import Backend, events, fails, failure, says

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
OPENAI_ROUTES, LORAX_ROUTES = (CHAT, COMPLETIONS), ("/", "/generate", "/generate_stream")
GENERATING = (*OPENAI_ROUTES, *LORAX_ROUTES)
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "", "messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"model": "", "prompt": "Hi"},
    **{route: {"inputs": "Hi"} for route in LORAX_ROUTES},
}
JSON = {"content-type": "application/json"}


def error_type_of(route: str, body: Any) -> str:
    """What the route's family calls the error; checks that the rest of the shape is right."""
    if route.startswith("/v1"):
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"message", "type", "param", "code"}
        return str(body["error"]["code"] or body["error"]["type"])
    assert body.keys() == {"error", "error_type"}
    return str(body["error_type"])


@pytest.mark.parametrize(
    ("method", "route", "content", "headers", "status", "error_type"),
    [
        *(
            ("POST", route, b'{"model": ', JSON, 400, "invalid_request_error")
            for route in OPENAI_ROUTES
        ),
        *(("POST", route, b"[]", JSON, 400, "invalid_request_error") for route in OPENAI_ROUTES),
        *(("POST", route, b"{}", {}, 415, "unsupported_media_type") for route in GENERATING),
        *(
            ("POST", route, b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type")
            for route in GENERATING
        ),
        *(("POST", route, b" " * 1001, JSON, 413, "request_too_large") for route in OPENAI_ROUTES),
        *(("POST", route, b" " * 1001, JSON, 413, "payload_too_large") for route in LORAX_ROUTES),
        *(("POST", route, b'{"inputs', JSON, 400, "bad_request") for route in LORAX_ROUTES),
        *(("POST", route, b"[]", JSON, 422, "validation") for route in LORAX_ROUTES),
        *(("GET", route, b"", {}, 405, "method_not_allowed") for route in OPENAI_ROUTES),
        ("GET", "/generate", b"", {}, 405, "method_not_allowed"),
        ("DELETE", "/", b"", {}, 405, "method_not_allowed"),
        ("POST", "/health", b"{}", JSON, 405, "method_not_allowed"),
        ("POST", "/v1/models", b"{}", JSON, 405, "method_not_allowed"),
        ("POST", "/v1/nothing", b"{}", JSON, 404, "unknown_url"),
        ("GET", "/v1", b"", {}, 404, "unknown_url"),
        ("GET", "/v1/models/", b"", {}, 404, "unknown_url"),
        ("GET", "/nothing", b"", {}, 404, "not_found"),
        ("GET", "/%0d%0a%e2%98%83", b"", {}, 404, "not_found"),
    ],
)
async def test_an_exchange_that_goes_wrong(
    method: str, route: str, content: bytes, headers: dict[str, str], status: int, error_type: str
) -> None:
    backend = Backend(max_body_bytes=1000)
    async with backend.client() as client:
        reply = await client.request(method, route, content=content, headers=headers)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert error_type_of(route, reply.json()) == error_type
    assert backend.sent == []


async def test_a_wrong_method_is_told_the_right_ones() -> None:
    async with Backend().client() as client:
        assert (await client.get(CHAT)).headers["allow"] == "POST"


@pytest.mark.parametrize("route", GENERATING)
async def test_a_body_of_the_largest_size_is_read(route: str) -> None:
    content = json.dumps(BODIES[route]).encode().ljust(1000)
    async with Backend(says("Hello"), max_body_bytes=1000).client() as client:
        reply = await client.post(route, content=content, headers=JSON)
    assert reply.status_code == 200


@pytest.mark.parametrize("route", GENERATING)
async def test_who_comes_before_the_processes_are_ready_is_told_so(route: str) -> None:
    reply = await Backend(ready=False).post(route, BODIES[route])
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert error_type_of(route, reply.json()) == "not_ready"
    assert "gpu_worker" in reply.text


@pytest.mark.parametrize("route", GENERATING)
async def test_who_comes_while_it_drains_is_sent_away(route: str) -> None:
    backend = Backend(says("Hello"))
    await backend.downstream.drain(0)
    reply = await backend.post(route, BODIES[route])
    assert reply.status_code == 503
    assert reply.headers["connection"] == "close"
    assert "retry-after" in reply.headers
    assert error_type_of(route, reply.json()) in ("shutting_down", "shutdown")
    assert backend.sent == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", OPENAI_ROUTES)
async def test_a_full_house_is_a_429(route: str, stream: bool) -> None:
    backend = Backend(says("Hello"), max_concurrent_requests=1)
    place = backend.downstream.admission.enter()
    reply = await backend.post(route, {**BODIES[route], "stream": stream})
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "1"
    assert error_type_of(route, reply.json()) == "rate_limit_exceeded"
    backend.downstream.admission.leave(place)
    assert (await backend.post(route, BODIES[route])).status_code == 200


async def test_a_full_house_is_a_429_for_lorax_and_an_event_in_its_stream() -> None:
    backend = Backend(says("Hello"), max_concurrent_requests=1)
    backend.downstream.admission.enter()
    told = {"error": "Model is overloaded", "error_type": "overloaded"}
    for route in ("/", "/generate"):
        reply = await backend.post(route, BODIES[route])
        assert (reply.status_code, reply.json()) == (429, told)
        assert reply.headers["retry-after"] == "1"
    reply = await backend.post("/generate_stream", BODIES["/generate_stream"])
    assert reply.status_code == 200
    assert events(reply.text) == [told]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", OPENAI_ROUTES)
async def test_a_failure_before_the_first_text_has_its_status_in_a_stream_too(
    route: str, stream: bool
) -> None:
    backend = Backend(fails(failure(message="no adapter `x`")))
    reply = await backend.post(route, {**BODIES[route], "model": "x", "stream": stream})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "no adapter `x`"
    assert error_type_of(route, reply.json()) == "model_not_found"
    assert backend.cancelled() == []


async def test_a_missing_adapter_is_a_424_for_lorax_and_an_event_in_its_stream() -> None:
    backend = Backend(fails(failure(message="no adapter `x`")))
    told = {
        "error": "Request failed during generation: no adapter `x`",
        "error_type": "generation",
    }
    body = {"inputs": "Hi", "parameters": {"adapter_id": "x"}}
    for route in ("/", "/generate"):
        reply = await backend.post(route, body)
        assert (reply.status_code, reply.json()) == (424, told)
    reply = await backend.post("/generate_stream", body)
    assert (reply.status_code, events(reply.text)) == (200, [told])


@pytest.mark.parametrize("route", [*OPENAI_ROUTES, "/generate_stream"])
async def test_a_failure_after_the_first_text_is_the_last_event(route: str) -> None:
    backend = Backend(fails(failure(FailureKind.INTERNAL, 500, "broken"), "Hel", "lo"))
    reply = await backend.post(route, {**BODIES[route], "stream": True})
    assert reply.status_code == 200
    told = events(reply.text)
    assert "broken" in json.dumps(told[-1])
    error_type_of(route, told[-1])
    assert "error" not in json.dumps(told[:-1])


@pytest.mark.parametrize("route", [*OPENAI_ROUTES, "/", "/generate"])
async def test_a_failure_after_some_text_is_the_whole_reply_where_it_is_not_streamed(
    route: str,
) -> None:
    backend = Backend(fails(failure(FailureKind.ADAPTER_INVALID, 422, "NaN"), "Hel"))
    reply = await backend.post(route, BODIES[route])
    assert reply.status_code == (422 if route.startswith("/v1") else 424)
    error_type_of(route, reply.json())


@pytest.mark.parametrize("route", GENERATING)
async def test_an_error_of_ours_is_a_500_that_tells_nothing(route: str) -> None:
    def breaks(_prompt: object) -> Any:
        raise ZeroDivisionError("a secret")

    backend = Backend(breaks)
    reply = await backend.post(route, BODIES[route])
    assert reply.status_code == 500
    assert "secret" not in reply.text
    assert error_type_of(route, reply.json()) in ("internal_error", "internal")
    assert backend.downstream.admission.in_flight == 0
