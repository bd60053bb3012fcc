"""What LoRAX's requests ask for, in its ranges and its sentences."""

import json
from typing import Any

import pytest

from frontend.adapters import AdapterNames
from frontend.lorax import Lorax
from pipeline.messages import AdapterKey, Logprobs, Prompt, Sampling
from tests.frontend.fakes import BASE, call_of, events, json_of, refusal_of

ROUTES = Lorax(
    base_model=BASE,
    adapters=AdapterNames(
        base_model=BASE, default_source="auto", sources=("local", "hub"), roots=()
    ),
    max_stop_sequences=4,
    max_best_of=3,
    compute_type=lambda: "cpu+optimized",
)
# As lorax-client sends it.
CLIENT_NULLS: dict[str, Any] = {
    "adapter_id": None,
    "adapter_source": None,
    "merged_adapters": None,
    "api_token": None,
    "do_sample": False,
    "max_new_tokens": None,
    "ignore_eos_token": False,
    "repetition_penalty": None,
    "return_full_text": False,
    "stop": [],
    "seed": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "best_of": None,
    "watermark": False,
    "details": True,
    "decoder_input_details": False,
    "return_k_alternatives": None,
    "response_format": None,
}


def body(inputs: Any = "Hi", **parameters: Any) -> bytes:
    return json.dumps({"inputs": inputs, "parameters": parameters}).encode()


def prompt(**parameters: Any) -> Prompt:
    return call_of(ROUTES.generate(body(**parameters), None)).prompt


def test_a_bare_request_is_greedy_and_keeps_its_stop_string() -> None:
    understood = call_of(ROUTES.generate(b'{"inputs": "Hi"}', None)).prompt
    assert understood.text == "Hi"
    assert understood.keep_stop
    assert understood.add_special_tokens
    assert understood.max_tokens is None
    assert understood.sampling.temperature == 0
    assert not understood.token_details


def test_the_clients_explicit_nulls_ask_for_nothing() -> None:
    understood = prompt(**CLIENT_NULLS)
    assert understood.token_details
    assert understood.sampling == Sampling(temperature=0.0, seed=understood.sampling.seed)
    assert call_of(ROUTES.compatible(b'{"inputs": "Hi", "parameters": null, "stream": null}', None))


def test_unknown_fields_are_ignored() -> None:
    assert prompt(no_such_option=5).text == "Hi"


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1}, 0.0),
        ({"temperature": 0}, 0.0),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, 0.0),
        ({"repetition_penalty": 1.2}, 0.0),
        ({"top_p": 1.0}, 0.0),
        ({"seed": 5}, 0.0),
        ({"best_of": 2, "temperature": 1}, 1.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 3}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"typical_p": 0.9}, 1.0),
        ({"min_p": 0.1}, 1.0),
    ],
)
def test_sampling_is_on_when_something_asks_for_it(
    parameters: dict[str, Any], temperature: float
) -> None:
    assert prompt(**parameters).sampling.temperature == temperature


@pytest.mark.parametrize(
    ("parameters", "attribute", "expected"),
    [
        ({"max_new_tokens": 5}, "max_tokens", 5),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"ignore_eos_token": True}, "ignore_eos", True),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"details": True}, "token_details", True),
        ({"details": True}, "logprobs", Logprobs()),
        ({"decoder_input_details": True}, "token_details", True),
        ({"decoder_input_details": True}, "prompt_details", True),
        ({"decoder_input_details": True}, "logprobs", Logprobs(0, 0)),
        ({"details": True, "return_k_alternatives": 3}, "logprobs", Logprobs(3)),
        ({"details": True, "top_n_tokens": 2}, "logprobs", Logprobs(2)),
        (
            {"details": True, "top_n_tokens": 2, "return_k_alternatives": 3},
            "logprobs",
            Logprobs(3),
        ),
        ({"return_k_alternatives": 3}, "logprobs", None),  # nothing is told of tokens
        ({"truncate": 7}, "truncate", 7),
        ({"best_of": 3, "do_sample": True}, "choices", 3),
        ({"best_of": 3, "do_sample": True}, "logprobs", Logprobs()),
        ({"apply_chat_template": True}, "chat", [{"role": "user", "content": "Hi"}]),
        ({"apply_chat_template": True}, "text", None),
        ({"apply_chat_template": False}, "chat", None),
        ({"adapter_id": ""}, "adapter", None),
        ({"adapter_id": "o/x"}, "adapter", AdapterKey("hub", "o/x")),
        (
            {"adapter_id": "x", "adapter_source": "local"},
            "adapter",
            AdapterKey("local", "x"),
        ),
        ({"adapter_id": "o/x", "api_token": "hf_t"}, "adapter_token", "hf_t"),
    ],
)
def test_a_parameter_is_honoured(
    parameters: dict[str, Any], attribute: str, expected: object
) -> None:
    assert getattr(prompt(**parameters), attribute) == expected


def test_the_numbers_of_sampling_are_honoured() -> None:
    numbers: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "typical_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "seed": (1 << 64) - 1,
        "watermark": True,
    }
    assert prompt(**numbers).sampling == Sampling(**numbers)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"temperature": -1}, "`temperature` must be non-negative"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"presence_penalty": -3}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 1.1}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"min_p": 2}, "`min_p` must be >= 0.0 and <= 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"seed": -1}, "`seed` must be an unsigned 64-bit integer"),
        ({"seed": 1 << 64}, "`seed` must be an unsigned 64-bit integer"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": [""]}, "`stop` strings cannot be empty"),
        ({"inputs": ""}, "`inputs` cannot be empty"),
        ({"best_of": 0}, "`best_of` must be > 0 and <= 3. Given: 0"),
        ({"best_of": 4}, "`best_of` must be > 0 and <= 3. Given: 4"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        (
            {"best_of": 2, "do_sample": True, "temperature": 0},
            "you must use sampling when `best_of` is > 1",
        ),
        (
            {"best_of": 2, "do_sample": True, "seed": 1},
            "`seed` must not be set when `best_of` > 1",
        ),
        ({"return_k_alternatives": 0}, "`return_k_alternatives` must be strictly positive"),
        ({"return_k_alternatives": 21}, "`return_k_alternatives` must be <= 20. Given: 21"),
        ({"top_n_tokens": 21}, "`top_n_tokens` must be >= 0 and <= 20. Given: 21"),
        (
            {"response_format": {"type": "regex"}},
            "`response_format` of type `regex` needs a `value`",
        ),
        (
            {"adapter_id": "a\nb"},
            "`adapter_id` must be printable and have at most 512 characters",
        ),
    ],
)
def test_what_is_wrong_is_said_in_loraxs_words_and_as_an_event_in_a_stream(
    parameters: dict[str, Any], sentence: str
) -> None:
    error = {"error": f"Input validation error: {sentence}", "error_type": "validation"}
    refusal = refusal_of(ROUTES.generate(body(**parameters), None))
    assert refusal.status == 422
    assert json_of(refusal) == error
    in_stream = refusal_of(ROUTES.generate_stream(body(**parameters), None))
    assert in_stream.status == 200
    assert (b"content-type", b"text/event-stream; charset=utf-8") in in_stream.headers
    if not {"best_of", "decoder_input_details"} & parameters.keys():
        assert events(in_stream.body) == [error]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
def test_a_stream_has_sentences_of_its_own(parameters: dict[str, Any], sentence: str) -> None:
    refusal = refusal_of(ROUTES.generate_stream(body(**parameters), None))
    assert events(refusal.body)[0]["error"] == f"Input validation error: {sentence}"


def test_one_reply_at_most_is_said_in_other_words() -> None:
    names = AdapterNames(base_model=BASE, default_source="auto", sources=("local",), roots=())
    one = Lorax(
        base_model=BASE,
        adapters=names,
        max_stop_sequences=4,
        max_best_of=1,
        compute_type=lambda: "cpu+optimized",
    )
    refusal = refusal_of(one.generate(body(best_of=2, do_sample=True), None))
    assert "`best_of` != 1 is not allowed for this endpoint" in json_of(refusal)["error"]
    assert call_of(one.generate(body(best_of=1), None))


# In LoRAX's order; each is said before all that follow it.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 4}, "`best_of` must be > 0 and <= 3"),
    ({"adapter_id": "a", "merged_adapters": {"ids": ["b"]}}, "at most one of `adapter_id`"),
    ({"merged_adapters": {"ids": []}, "adapter_id": None}, "at least one adapter ID"),
    ({"best_of": 2, "do_sample": True, "temperature": 0}, "you must use sampling"),
    ({"temperature": -1}, "`temperature`"),
    ({"repetition_penalty": 0}, "`repetition_penalty`"),
    ({"frequency_penalty": 3}, "`frequency_penalty`"),
    ({"presence_penalty": 3}, "`presence_penalty`"),
    ({"top_p": 2}, "`top_p`"),
    ({"typical_p": 2}, "`typical_p`"),
    ({"top_k": 0}, "`top_k`"),
    ({"return_k_alternatives": 0}, "`return_k_alternatives`"),
    ({"max_new_tokens": 0}, "`max_new_tokens`"),
    ({"stop": list("abcde")}, "`stop`"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set"),
    ({"inputs": ""}, "`inputs` cannot be empty"),
    ({"adapter_id": "x", "adapter_source": "moon"}, "Invalid source"),
]


@pytest.mark.parametrize("first", range(len(WRONG) - 1))
def test_of_several_things_that_are_wrong_loraxs_first_is_said(first: int) -> None:
    wrong, sentence = WRONG[first]
    for later, _ in WRONG[first + 1 :]:
        refusal = refusal_of(ROUTES.generate(body(**{**later, **wrong}), None))
        assert sentence in json_of(refusal)["error"]


def test_another_source_fails_as_a_download_does() -> None:
    refusal = refusal_of(ROUTES.generate(body(adapter_id="x", adapter_source="moon"), None))
    assert refusal.status == 424
    assert json_of(refusal) == {
        "error": "Request failed during generation: Server error: "
        "Invalid source 'moon' when downloading adapter 'x'",
        "error_type": "generation",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        b"{}",
        b'{"inputs": 5}',
        b'{"inputs": null}',
        b'{"inputs": "Hi", "parameters": []}',
        b'{"inputs": "Hi", "stream": "yes"}',
        body(max_new_tokens=-1),
        body(max_new_tokens="5"),
        body(temperature="hot"),
        body(stop=5),
        body(do_sample=1),
        body(seed=1.5),
        body(details="yes"),
        body(truncate=-1),
        body(best_of=-1),
        body(decoder_input_details=1),
        body(return_k_alternatives="3"),
        body(top_n_tokens=-1),
        body(apply_chat_template="yes"),
        body(watermark=1),
    ],
)
def test_wrong_types_are_a_422_in_a_stream_too(wrong: bytes) -> None:
    for route in (ROUTES.compatible, ROUTES.generate, ROUTES.generate_stream):
        refusal = refusal_of(route(wrong, None))
        assert refusal.status == 422
        assert json_of(refusal)["error"].startswith("Failed to deserialize the JSON body")


def test_malformed_json_is_a_400_in_a_stream_too() -> None:
    for route in (ROUTES.compatible, ROUTES.generate, ROUTES.generate_stream):
        refusal = refusal_of(route(b'{"inputs": ', None))
        assert refusal.status == 400
        assert json_of(refusal)["error_type"] == "bad_request"


def test_the_root_streams_when_it_is_told_to_and_the_others_do_as_they_are_called() -> None:
    wants_stream = b'{"inputs": "Hi", "stream": true}'
    assert call_of(ROUTES.compatible(wants_stream, None)).streamed
    assert not call_of(ROUTES.compatible(b'{"inputs": "Hi"}', None)).streamed
    assert not call_of(ROUTES.generate(wants_stream, None)).streamed
    assert call_of(ROUTES.generate_stream(b'{"inputs": "Hi"}', None)).streamed
    assert call_of(ROUTES.generate_stream(b'{"inputs": "Hi"}', None)).prompt.token_details
