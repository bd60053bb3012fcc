"""The document of the API: every route is in it, and what it says comes from what decodes."""

import re
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from starlette.routing import Route

from frontend import docs_page, openai
from frontend.openapi import OPERATIONS, document
from frontend.reply_schemas import ChatCompletion, Completion, Generated, LoraxError, OpenAIError
from tests.frontend.fakes import Backend, says

pytestmark = pytest.mark.anyio

CHAT = {"model": "", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return document(version="1", keys_are_needed=True, open_paths={"/health"})


def test_every_route_is_described_and_no_other() -> None:
    routes = [
        (method.lower(), re.sub(r":\w+}", "}", route.path))
        for route in Backend().app.routes
        if isinstance(route, Route)
        for method in (route.methods or ())
        if method != "HEAD"
    ]
    assert sorted(routes) == sorted((one.method, one.path) for one in OPERATIONS)


def test_a_field_of_a_body_is_described_as_it_is_decoded(described: dict[str, Any]) -> None:
    schema = described["components"]["schemas"]["ChatRequest"]
    assert set(schema["properties"]) == set(openai.ChatRequest.__struct_encode_fields__)
    assert schema["required"] == ["messages", "model"] or schema["required"] == [
        "model",
        "messages",
    ]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["top_p"]["anyOf"][0] == {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
    }


def test_what_is_not_supported_says_which_values_ask_for_nothing(
    described: dict[str, Any],
) -> None:
    fields = described["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["suffix"] == {"enum": [None, ""], "description": "not supported", "default": None}
    assert fields["user"] == {"default": None}  # ignored


def test_a_key_is_asked_for_where_the_server_does(described: dict[str, Any]) -> None:
    assert described["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in described["paths"]["/health"]["get"]
    free = document(version="1", keys_are_needed=False, open_paths=())
    assert "security" not in free["paths"]["/v1/models"]["get"]


async def test_the_server_shows_it_without_a_key_under_both_names() -> None:
    backend = Backend(api_key=("secret",))
    ours, lorax = await backend.get("/openapi.json"), await backend.get("/api-doc/openapi.json")
    assert ours.json() == lorax.json()
    assert ours.json()["openapi"] == "3.1.0"
    assert "secret" not in ours.text


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/chat/completions", CHAT, ChatCompletion),
        ("/v1/completions", {"model": "", "prompt": "Hi"}, Completion),
        ("/v1/completions", {"model": ""}, OpenAIError),
        ("/generate", {"inputs": "Hi", "parameters": {"details": True}}, Generated),
        ("/generate", {"inputs": "Hi"}, Generated),
        ("/generate", {"inputs": ""}, LoraxError),
        ("/", {"inputs": "Hi"}, list[Generated]),
    ],
)
async def test_a_reply_is_what_the_document_says(path: str, body: Any, kind: Any) -> None:
    reply = await Backend(says("Hello", "!")).post(path, body)
    decoded = msgspec.json.decode(reply.content, type=kind)
    assert msgspec.to_builtins(decoded) == reply.json()  # nothing is left out


class Page(HTMLParser):
    """What a browser would load, follow, and find."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: set[str] = set()
        self.targets: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert name != "src"
            if name == "href":
                self.links.add(str(value))
            if name == "id":
                self.targets.add(f"#{value}")

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_the_page_shows_every_route_and_type_and_loads_nothing() -> None:
    reply = await Backend().get("/docs")
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    page = Page(reply.text)
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert page.links <= page.targets | {"/openapi.json"}
    for operation in OPERATIONS:
        assert f"{operation.method.upper()} {operation.path}" in page.text
    for field in openai.ChatRequest.__struct_encode_fields__:
        assert field in page.text


def test_text_in_the_document_is_no_markup_on_the_page(described: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>`<b>`"
    changed = {**described, "info": {"title": evil, "version": evil, "description": evil}}
    page = Page(docs_page.page(changed).decode())
    assert not page.tags & {"script", "b"}
    assert "<b>" in page.text
