"""Templates through the whole server: what clients may say of them, and what comes of a bad one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.end_to_end import tiny
from tests.end_to_end.server import Server

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def server(
    serve: Callable[..., Server], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Server:
    model = tiny.make_model(tmp_path_factory.mktemp("templates") / "model", model_folder)
    return serve(
        environment={"LORADEX_ALLOW_CHAT_TEMPLATE": "true"},
        model_folder=model,
        adapter_root=tmp_path_factory.mktemp("none"),
        template_seconds=0.5,
    )


def prompt_tokens(server: Server, **fields: Any) -> int:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)
    with client:
        reply = client.chat.completions.create(
            model="", messages=MESSAGES, max_tokens=1, extra_body=fields
        )
    assert reply.usage is not None
    return reply.usage.prompt_tokens


def test_a_prompt_is_what_the_requests_template_makes_of_it(server: Server) -> None:
    own = "{{ messages[0].content }}{% for d in documents %} {{ d.title }}{% endfor %} {{ who }}"
    fields = {
        "chat_template": own,
        "documents": [{"title": "one"}, {"title": "two"}],
        "chat_template_kwargs": {"who": "me"},
    }
    body = {"model": "", "prompt": "Hi one two me", "max_tokens": 1}
    plain = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert prompt_tokens(server, **fields) == plain["usage"]["prompt_tokens"]


def test_a_last_message_that_goes_on_has_no_end(server: Server) -> None:
    assert (
        prompt_tokens(server, continue_final_message=True)
        < prompt_tokens(server, add_generation_prompt=False)
        < prompt_tokens(server)
    )


def test_a_bad_template_is_a_422_with_its_line_and_an_endless_one_too(server: Server) -> None:
    def refusal(template: str) -> str:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            prompt_tokens(server, chat_template=template)
        body: Any = caught.value.body
        assert body["code"] == "template_error"
        return str(body["message"])

    assert refusal("\n{{ messages.nothing.at_all }}").endswith("(line 2)")
    assert refusal("\n\n{% nonsense %}").endswith("(line 3)")
    assert refusal(ENDLESS) == "the chat template takes more than 0.5 seconds"
    assert prompt_tokens(server)
