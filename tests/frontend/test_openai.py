"""What OpenAI's requests ask for: each field is honoured, ignored, or refused by name."""

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from frontend.adapters import AdapterNames
from frontend.authorization import Authorization
from frontend.openai import DEFAULT_COMPLETION_TOKENS, OpenAI
from pipeline.messages import AdapterKey, Logprobs, Prompt, Sampling
from tests.frontend.fakes import BASE, call_of, json_of, make_adapter, refusal_of

ROUTES = OpenAI(
    base_model=BASE,
    adapters=AdapterNames(
        base_model=BASE, default_source="auto", sources=("local", "hub"), roots=()
    ),
    max_stop_sequences=4,
    max_choices=8,
)


def chat(**changes: Any) -> bytes:
    body = {"model": "", "messages": [{"role": "user", "content": "Hi"}], **changes}
    return json.dumps(body).encode()


def completion(**changes: Any) -> bytes:
    return json.dumps({"model": "", "prompt": "Hi", **changes}).encode()


def chat_prompt(**changes: Any) -> Prompt:
    return call_of(ROUTES.chat(chat(**changes), None)).prompt


def completion_prompt(**changes: Any) -> Prompt:
    return call_of(ROUTES.completion(completion(**changes), None)).prompt


def error_of_chat(**changes: Any) -> dict[str, Any]:
    refusal = refusal_of(ROUTES.chat(chat(**changes), None))
    assert refusal.status == 400
    error: dict[str, Any] = json_of(refusal)["error"]
    assert error["type"] == "invalid_request_error"
    return error


def error_of_completion(**changes: Any) -> dict[str, Any]:
    refusal = refusal_of(ROUTES.completion(completion(**changes), None))
    assert refusal.status == 400
    error: dict[str, Any] = json_of(refusal)["error"]
    return error


def test_a_bare_chat_is_sampled_as_openai_does_and_goes_on_as_long_as_it_fits() -> None:
    prompt = chat_prompt()
    assert prompt.chat == [{"role": "user", "content": "Hi"}]
    assert prompt.max_tokens is None
    assert prompt.adapter is None
    assert prompt.sampling == Sampling(seed=prompt.sampling.seed)
    assert not prompt.keep_stop


def test_a_bare_completion_has_openais_length() -> None:
    prompt = completion_prompt()
    assert prompt.text == "Hi"
    assert prompt.max_tokens == DEFAULT_COMPLETION_TOKENS


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", 0, {"temperature": 0.0}),
        ("temperature", 2, {"temperature": 2.0}),
        ("top_p", 0.5, {"top_p": 0.5}),
        ("top_p", 0, {"temperature": 0.0}),
        ("top_k", 7, {"top_k": 7}),
        ("top_k", -1, {"top_k": 0}),
        ("min_p", 0.1, {"min_p": 0.1}),
        ("typical_p", 0.9, {"typical_p": 0.9}),
        ("repetition_penalty", 1.2, {"repetition_penalty": 1.2}),
        ("frequency_penalty", -2, {"frequency_penalty": -2.0}),
        ("presence_penalty", 2, {"presence_penalty": 2.0}),
        ("seed", 5, {"seed": 5}),
        ("logit_bias", {"5": -100, "7": 0.5}, {"logit_bias": ((5, -100.0), (7, 0.5))}),
        ("min_tokens", 3, {"min_tokens": 3}),
        ("seed", -1, {"seed": (1 << 64) - 1}),
        ("seed", 1 << 70, {"seed": 0}),
    ],
)
def test_sampling_is_honoured_on_both_routes(
    field: str, value: float, expected: dict[str, Any]
) -> None:
    for prompt in (chat_prompt(**{field: value}), completion_prompt(**{field: value})):
        assert prompt.sampling == Sampling(**{"seed": prompt.sampling.seed, **expected})


def test_seeds_are_drawn_where_none_is_given() -> None:
    seeds = {chat_prompt().sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.mark.parametrize(
    ("changes", "attribute", "expected"),
    [
        ({"max_tokens": 5}, "max_tokens", 5),
        ({"max_completion_tokens": 6}, "max_tokens", 6),
        ({"max_completion_tokens": 6, "max_tokens": 6}, "max_tokens", 6),
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop": ["x", "y"]}, "stop", ("x", "y")),
        ({"stop": None}, "stop", ()),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"stop_token_ids": [5, 6]}, "stop_token_ids", (5, 6)),
        ({"n": 3}, "choices", 3),
        ({"logprobs": True}, "logprobs", Logprobs()),
        ({"logprobs": True}, "token_details", True),
        ({"logprobs": True, "top_logprobs": 20}, "logprobs", Logprobs(20)),
        ({"logprobs": False, "top_logprobs": 0}, "logprobs", None),
        ({"ignore_eos_token": True}, "ignore_eos", True),
        ({"model": BASE}, "adapter", None),
        ({"model": "org/x"}, "adapter", AdapterKey("hub", "org/x")),
        (
            {"model": "x", "adapter_source": "local"},
            "adapter",
            AdapterKey("local", "x"),
        ),
        ({"model": "org/x", "api_token": "hf_t"}, "adapter_token", "hf_t"),
    ],
)
def test_a_field_is_honoured(changes: dict[str, Any], attribute: str, expected: object) -> None:
    assert getattr(chat_prompt(**changes), attribute) == expected


def test_the_bearer_token_is_shown_to_the_adapters_source() -> None:
    prompt = call_of(ROUTES.chat(chat(model="org/x"), Authorization(adapter_token="hf_t"))).prompt
    assert prompt.adapter_token == "hf_t"


def test_a_local_adapter_is_found(tmp_path: Path) -> None:
    make_adapter(tmp_path, "here")
    names = AdapterNames(
        base_model=BASE, default_source="auto", sources=("local", "hub"), roots=(tmp_path,)
    )
    routes = OpenAI(base_model=BASE, adapters=names, max_stop_sequences=4, max_choices=8)
    prompt = call_of(routes.chat(chat(model="here"), None)).prompt
    assert prompt.adapter == AdapterKey("local", "here")


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in ("n", "logprobs", "logit_bias", "stop", "seed", "temperature")),
        {"n": 1},
        {"logprobs": False, "top_logprobs": 0},
        {"logit_bias": {}},
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none", "functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"], "audio": None, "prediction": None},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"parallel_tool_calls": False, "safety_identifier": "x", "prompt_cache_key": "k"},
    ],
)
def test_what_asks_for_nothing_changes_nothing(changes: dict[str, Any]) -> None:
    assert chat_prompt(**{**changes, "seed": 1}) == chat_prompt(seed=1)
    assert call_of(ROUTES.chat(chat(**changes), None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto!"),
        ("guided_whitespace_pattern", " "),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
        ("reasoning_effort", "low"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}),
        ("no_such_option", 1),
        ("best_of", 1),
        ("max_new_tokens", 1),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(field: str, value: Any) -> None:
    error = error_of_chat(**{field: value})
    assert f"`{field}`" in error["message"]
    assert error["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("seed", 1.5),
        ("n", 0),
        ("n", True),
        ("n", 9),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"5" * 5000: 1}),
        ("logit_bias", {str(1 << 31): 1}),
        ("logit_bias", {str(one): 1 for one in range(301)}),
        ("min_tokens", -1),
        ("stop_token_ids", 5),
        ("max_tokens", -1),
        ("max_tokens", 1 << 31),
        ("stop", 5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", list("abcde")),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("ignore_eos", 1),
        ("model", None),
        ("model", 5),
        ("model", "a\nb"),
        ("adapter_source", "moon"),
        ("adapter_source", "s3"),
        ("api_token", "a\nb"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(field: str, value: Any) -> None:
    body = {"model": "org/x", field: value}
    assert error_of_chat(**body)["param"] == field
    assert error_of_completion(**body)["param"] == field


@pytest.mark.parametrize(
    ("messages", "parameter"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ([{"content": "Hi"}], "messages[0].role"),
        ([{"role": "king", "content": "Hi"}], "messages[0].role"),
        ([{"role": "tool", "content": "Hi"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "tool_call_id": "1"}], "messages[0].content"),
        (
            [
                {
                    "role": "user",
                    "content": "Hi",
                    "tool_calls": [{"id": "1", "function": {"name": "f"}}],
                }
            ],
            "messages[0].tool_calls",
        ),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": None}],
            "messages[1].content",
        ),
        ([{"role": "user", "content": "a", "colour": "red"}], "messages[0].colour"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
    ],
)
def test_messages_that_cannot_be_are_refused_with_their_place(
    messages: Any, parameter: str
) -> None:
    assert error_of_chat(messages=messages)["param"] == parameter


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias[...]"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
    ],
)
def test_a_chat_does_not_take(changes: dict[str, Any], parameter: str) -> None:
    assert error_of_chat(**changes)["param"] == parameter


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"prompt": ["a"] * 3, "n": 3}, "n"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_a_completion_does_not_take(changes: dict[str, Any], parameter: str) -> None:
    assert error_of_completion(**changes)["param"] == parameter


@pytest.mark.parametrize(
    ("changes", "wanted", "choices"),
    [
        ({}, None, 1),
        ({"logprobs": 0}, Logprobs(), 1),
        ({"logprobs": 5}, Logprobs(5), 1),
        ({"logprobs": 2, "echo": True}, Logprobs(2, prompt_top=2), 1),
        ({"echo": True}, None, 1),
        ({"n": 2, "best_of": 4}, Logprobs(), 4),
        ({"n": 2, "best_of": 2, "stream": True}, None, 2),
        ({"n": 2, "best_of": 4, "logprobs": 3, "echo": True}, Logprobs(3, prompt_top=3), 4),
    ],
)
def test_a_completion_wants_those_logprobs_that_it_shows_or_ranks_by(
    changes: dict[str, Any], wanted: Logprobs | None, choices: int
) -> None:
    prompt = completion_prompt(**changes)
    assert (prompt.logprobs, prompt.choices) == (wanted, choices)
    assert prompt.token_details == (wanted is not None)
    assert prompt.prompt_details == bool(changes.get("echo"))


def test_messages_are_handed_on_as_templates_want_them() -> None:
    messages = [
        {"role": "developer", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "audio": None},
    ]
    assert chat_prompt(messages=messages).chat == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
        {"role": "assistant", "content": ""},
    ]


def test_two_lengths_that_differ_are_refused() -> None:
    assert error_of_chat(max_tokens=5, max_completion_tokens=6)["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("prompt", "text", "token_ids"),
    [
        ("Hi", "Hi", None),
        ("", "", None),
        (["Hi"], "Hi", None),
        ([1, 2, 3], None, [1, 2, 3]),
        ([[1, 2]], None, [1, 2]),
        ([7], None, [7]),
    ],
)
def test_a_completion_takes_a_text_or_its_token_ids(
    prompt: Any, text: str | None, token_ids: list[int] | None
) -> None:
    understood = completion_prompt(prompt=prompt)
    assert understood.text == text
    assert understood.token_ids == (array("i", token_ids).tobytes() if token_ids else None)


@pytest.mark.parametrize(
    "prompt", [[], [[]], ["a", ""], [1, "a"], [[1], 2], [-1], [1 << 31], [1.5], 5, None]
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert str(error_of_completion(prompt=prompt)["param"]).startswith("prompt")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": NaN}',
        b'{"model": "", "metadata": ' + b"[" * 100_000,
    ],
)
def test_what_is_not_json_is_said_to_be_no_json(body: bytes) -> None:
    for refusal in (ROUTES.chat(body, None), ROUTES.completion(body, None)):
        error = json_of(refusal_of(refusal))["error"]
        assert refusal_of(refusal).status == 400
        assert "JSON" in error["message"]


def test_json_that_is_no_object_is_refused() -> None:
    refusal = refusal_of(ROUTES.chat(b"[]", None))
    assert refusal.status == 400
    assert "object" in json_of(refusal)["error"]["message"]
