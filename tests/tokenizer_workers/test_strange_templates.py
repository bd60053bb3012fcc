"""Whatever a template that nobody vouches for does, its own prompt alone suffers."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.messages import ChatOptions, FailureKind, Tools
from tokenizer_workers.chat_template import ChatTemplate
from tokenizer_workers.render import Job, Result, TemplateLimits
from tokenizer_workers.strange_templates import Renderer

GOOD = "{{ bos_token }}{% for m in messages %}{{ m.content }};{% endfor %}"
LIMITS = TemplateLimits({"bos_token": "<s>"}, 1000)
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(LIMITS, seconds=0.3, nbytes=256 << 20)
    yield made
    made.close()


def render(renderer: Renderer, template: str, **options: Any) -> Result:
    return renderer.render(Job(MESSAGES, ChatOptions(template=template, **options)))


def sentence(result: Result) -> str:
    assert result.failure is not None
    assert (result.failure.status, result.failure.kind) == (422, FailureKind.TEMPLATE)
    return result.failure.message


def test_it_renders_as_the_workers_own_code_does(renderer: Renderer) -> None:
    options: dict[str, Any] = {"variables": {"x": 1}, "documents": [{"title": "a"}]}
    template = GOOD + "{{ x }}{{ documents[0].title }}{{ tools is none }}"
    own = ChatTemplate(template, LIMITS.special_tokens)
    expected = own.render(MESSAGES, options=ChatOptions(**options))
    assert render(renderer, template, **options) == Result(expected)
    assert expected == "<s>Hi;1aTrue"


def test_the_variables_of_an_adapter_are_its_own(renderer: Renderer) -> None:
    options = ChatOptions(template=GOOD)
    job = Job(MESSAGES, options, special_tokens={"bos_token": "<own>"})
    assert renderer.render(job) == Result("<own>Hi;")
    assert renderer.render(Job(MESSAGES, options)) == Result("<s>Hi;"), "of the same template"


def test_tools_are_shown_by_a_template_that_knows_them_and_explained_to_one_that_does_not(
    renderer: Renderer,
) -> None:
    tools = Tools([{"name": "look", "parameters": {"type": "object", "strict": True}}])
    knows = "{% for t in tools %}{{ t.function.name }};{% endfor %}{{ messages[0].content }}"
    assert renderer.render(Job(MESSAGES, ChatOptions(template=knows), tools)) == Result("look;Hi")
    explained = renderer.render(Job(MESSAGES, ChatOptions(template=GOOD), tools)).text
    assert explained.startswith("<s>You can call these functions")
    assert '"look"' in explained
    assert "<tool_call>" in explained
    call = {"function": {"name": "look", "arguments": '{"a": 1}'}}
    reply: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
    shows = (
        knows
        + "{% if messages[1] %}{{ messages[1].tool_calls[0].function.arguments.a }}{% endif %}"
    )
    assert renderer.render(Job([*MESSAGES, reply], ChatOptions(template=shows), tools)) == Result(
        "look;Hi1"
    )


LOOPS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a filter": "{% for a in range(99999) %}{% set b = range(99999) | sort %}{% endfor %}",
}


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_one_that_does_not_end_is_ended(renderer: Renderer, template: str) -> None:
    assert "takes more than 0.3 seconds" in sentence(render(renderer, template))
    assert render(renderer, GOOD) == Result("<s>Hi;")


HUGE = {
    "a product": "{{ 'a' * 10 ** 12 }}",
    "a format": "{{ '%1000000000000d' % 1 }}",
    "a filter": "{{ 'a' | center(1000000000000) }}",
    "a list": "{% set l = [messages * 10 ** 9] %}{{ l }}",
}


@pytest.mark.parametrize("template", HUGE.values(), ids=HUGE)
def test_one_that_takes_much_memory_is_ended(renderer: Renderer, template: str) -> None:
    assert sentence(render(renderer, template))
    assert render(renderer, GOOD) == Result("<s>Hi;")


def test_one_that_writes_much_is_ended(renderer: Renderer) -> None:
    written = render(renderer, "{% for a in range(1000) %}ab{% endfor %}")
    assert sentence(written) == "the chat template writes more than 1000 characters"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}\n{% for %}", "(line 2)"),
        ("\n\n{{ messages[0].nothing.at_all }}", "(line 3)"),
        ("\n{% if true %}{{ raise_exception('Roles must alternate') }}{% endif %}", "(line 2)"),
        ("{% include 'x' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ '\\ud800' }}", "cannot be rendered"),
        ("{{ strftime_now.__globals__.os }}", "unsafe"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    renderer: Renderer, template: str, message: str
) -> None:
    assert message in sentence(render(renderer, template))


def test_a_template_that_is_nested_too_deeply_is_refused(renderer: Renderer) -> None:
    assert sentence(render(renderer, "{{" + "(" * 5000 + ")" * 5000 + "}}"))


def test_its_process_is_told_no_secret_and_may_write_no_file(renderer: Renderer) -> None:
    os.environ["SECRET_OF_TEST"] = "x"
    try:
        other = Renderer(LIMITS, seconds=1, nbytes=256 << 20)
        assert render(other, GOOD).failure is None
    finally:
        del os.environ["SECRET_OF_TEST"]
    with open(f"/proc/{other.pid}/environ", "rb") as environ:
        assert b"SECRET" not in environ.read()
    with open(f"/proc/{other.pid}/limits") as limits:
        lines = {line[:25].strip(): line[25:].split() for line in limits}
    assert lines["Max file size"][:2] == ["0", "0"]
    assert lines["Max address space"][0] == str(256 << 20)
    other.close()
    assert other.pid is None


def test_a_process_that_was_killed_is_started_again() -> None:
    renderer = Renderer(LIMITS, seconds=5, nbytes=256 << 20)
    assert render(renderer, GOOD).failure is None
    first = renderer.pid
    renderer.interrupt()
    sentence(render(renderer, GOOD))
    assert render(renderer, GOOD) == Result("<s>Hi;")
    assert renderer.pid != first
    renderer.close()


def test_templates_that_are_kept_leave_room_for_others() -> None:
    """Together they take more than there is; none of them has to know of the others."""
    renderer = Renderer(LIMITS, seconds=20, nbytes=200 << 20)
    for number in range(30):  # of at least 8 MiB each
        template = GOOD + "{% set text = '" + f"{number:02}" * (1 << 21) + "' %}"
        assert render(renderer, template) == Result("<s>Hi;")
    renderer.close()


def test_the_time_is_the_processors_and_each_prompts_own(renderer: Renderer) -> None:
    half = "{% for a in range(99999) %}{{ a if a > 99999 }}{% endfor %}"
    before = time.monotonic()
    results = [render(renderer, half) for _ in range(40)]
    assert time.monotonic() - before > 0.3
    assert all(result.failure is None for result in results)
