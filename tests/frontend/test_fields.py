"""What becomes of each field of each route: honoured, refused or ignored, and why.

A field that is honoured has an example that changes what is asked for or how it is answered; one
that is ignored has an example that changes neither; one that is refused is named in the refusal.
A field that a route knows and that is not here fails a test, and so does one that is here only.
"""

import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import pytest

from frontend.adapters import AdapterNames
from frontend.authorization import Authorization
from frontend.calls import Call, Part, WholeShape
from frontend.embeddings import (
    EmbeddingRequest,
    Embeddings,
    EmbedParameters,
    EmbedRequest,
    FeatureExtractionRequest,
)
from frontend.exchange import HttpReply, PiecewiseReply
from frontend.lorax import Lorax, Parameters, Request
from frontend.openai import ChatRequest, CompletionRequest, OpenAI
from frontend.tokenization import Inputs
from pipeline.messages import (
    Alternative,
    End,
    FinishReason,
    Piece,
    PoolingKind,
    PromptDetails,
    TokenDetail,
    Usage,
)
from tests.frontend.fakes import BASE, json_of, streamed

NAMES = AdapterNames(base_model=BASE, default_source="hub", sources=("hub", "s3"), roots=())
OPENAI = OpenAI(
    base_model=BASE,
    adapters=NAMES,
    max_stop_sequences=4,
    max_choices=8,
    allow_chat_template=True,
)
LORAX = Lorax(
    base_model=BASE,
    adapters=NAMES,
    max_stop_sequences=4,
    max_best_of=8,
    compute_type=lambda: "cpu",
)
EMBEDDINGS = Embeddings(
    base_model=BASE, adapters=NAMES, pooling=PoolingKind.LAST, hidden_size=lambda: 2
)


class Field(NamedTuple):
    what: Literal["honoured", "refused", "ignored"]
    why: str
    example: Any
    beside: dict[str, Any] = {}  # what else the example needs


def honoured(why: str, example: Any, **beside: Any) -> Field:
    return Field("honoured", why, example, beside)


def refused(why: str, example: Any) -> Field:
    return Field("refused", why, example)


def ignored(why: str, example: Any) -> Field:
    return Field("ignored", why, example)


MERGE = {"ids": ["org/a", "org/b"], "weights": [1, 1]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
ONE_ANSWER = "is for models that think first, which none of ours does"

BOTH = {
    "model": honoured(
        "the adapter, by id or name; empty or the base model's id is the base", "o/a"
    ),
    "stream": honoured("server-sent events", True),
    "stream_options": honoured("include_usage", {"include_usage": True}, stream=True),
    "temperature": honoured("0 is greedy", 0.5),
    "top_p": honoured("0 is greedy", 0.5),
    "seed": honoured("the first choice's; those of the others follow from it", 5),
    "stop": honoured("cut from the text", ["x"]),
    "frequency_penalty": honoured("over the output", 1),
    "presence_penalty": honoured("over the output", 1),
    "n": honoured("choices that share the prompt's computation", 2),
    "logit_bias": honoured("by token id", {"5": -100}),
    "top_k": honoured("vLLM's and LoRAX's", 5),
    "min_p": honoured("vLLM's", 0.1),
    "typical_p": honoured("LoRAX's", 0.5),
    "repetition_penalty": honoured("vLLM's and LoRAX's", 1.5),
    "ignore_eos": honoured("vLLM's", True),
    "ignore_eos_token": honoured("LoRAX's", True),
    "min_tokens": honoured("vLLM's: no token that ends it comes earlier", 2),
    "stop_token_ids": honoured("vLLM's: each ends it as EOS does", [5]),
    "adapter_source": honoured("LoRAX's", "s3", model="bucket/a"),
    "merged_adapters": honoured("LoRAX's", MERGE),
    "response_format": honoured("by a grammar", {"type": "json_object"}),
    "structured_outputs": honoured("vLLM's", {"regex": "a+"}),
    "guided_json": honoured("vLLM's older name", {"type": "object"}),
    "guided_regex": honoured("vLLM's older name", "a+"),
    "guided_choice": honoured("vLLM's older name", ["a", "b"]),
    "guided_grammar": honoured("vLLM's older name", 'start: "a"'),
    "guided_whitespace_pattern": refused("the grammar decides where white space is", "a"),
    "guided_decoding_backend": ignored("there is one", "xgrammar"),
    "api_token": honoured("LoRAX's: shown to the adapter's source", "t", model="o/a"),
    "timeout": honoured("ours: seconds, after which it fails", 5),
    "user": ignored("names an end user, for abuse reports", "me"),
    "metadata": ignored("labels of a stored reply; nothing is stored", {"a": "b"}),
    "store": ignored("nothing is stored", True),
    "service_tier": ignored("there is one", "auto"),
    "safety_identifier": ignored("names an end user, for abuse reports", "me"),
    "prompt_cache_key": ignored("the prefix cache needs no hint", "k"),
    "prompt_cache_retention": ignored("the prefix cache keeps what it can", "24h"),
}
CHAT = BOTH | {
    "messages": honoured(
        "through a chat template: docs/chat_templates.md", [{"role": "user", "content": "Ho"}]
    ),
    "max_tokens": honoured("the old name of max_completion_tokens", 5),
    "max_completion_tokens": honoured("the length", 5),
    "chat_template": honoured("vLLM's, where the operator allows it", "{{ messages }}"),
    "chat_template_kwargs": honoured("vLLM's: variables of the template", {"thinking": True}),
    "documents": honoured("vLLM's: for templates that know them", [{"title": "T", "text": "x"}]),
    "add_generation_prompt": honoured("vLLM's", False),
    "continue_final_message": honoured("vLLM's: the last message goes on", True),
    "add_special_tokens": honoured("vLLM's: besides those of the template", True),
    "logprobs": honoured("of the content's tokens", True),
    "top_logprobs": honoured("up to 20", 2, logprobs=True),
    "tools": honoured("shown to the model, whose calls are read", TOOLS),
    "tool_choice": honoured("required and a named one by a grammar", "required", tools=TOOLS),
    "parallel_tool_calls": honoured("false: one call at most", False, tools=TOOLS),
    "tool_prompt": honoured("LoRAX's: how templates without tools say them", "T", tools=TOOLS),
    "functions": refused("the old name of tools, which OpenAI has given up", [{"name": "f"}]),
    "function_call": refused("the old name of tool_choice", {"name": "f"}),
    "modalities": refused("text is all that there is", ["audio"]),
    "audio": refused("text is all that there is", {"voice": "x"}),
    "reasoning_effort": refused(ONE_ANSWER, "low"),
    "verbosity": refused("changes the answer in a way that only OpenAI knows", "low"),
    "web_search_options": refused("there is no search", {}),
    "prediction": refused("nothing is speculated", {"type": "content", "content": "x"}),
}
COMPLETION = BOTH | {
    "prompt": honoured("texts and token ids, one or several", ["a", [1, 2]]),
    "max_tokens": honoured("0 gives the prompt alone", 0),
    "echo": honoured("the prompt before each choice, with its logprobs", True),
    "logprobs": honoured("up to 20, OpenAI has 5", 2),
    "best_of": honoured("ranked by the mean log-probability", 3),
    "suffix": refused("models that fill in are not served", "x"),
}
LORAX_PARAMETERS = {
    "adapter_id": honoured("empty or the base model's id is the base", "o/a"),
    "adapter_source": honoured("where the adapter is", "s3", adapter_id="bucket/a"),
    "merged_adapters": honoured("as LoRAX's, with cat", MERGE),
    "api_token": honoured("shown to the adapter's source", "t", adapter_id="o/a"),
    "timeout": honoured("ours: seconds, after which it fails", 5),
    "best_of": honoured("ranked by the mean log-probability", 2, do_sample=True),
    "temperature": honoured("0 is greedy", 0.5),
    "repetition_penalty": honoured("over prompt and output", 1.5),
    "frequency_penalty": honoured("over the output, as OpenAI counts", 1),
    "presence_penalty": honoured("over the output, as OpenAI counts", 1),
    "top_k": honoured("turns sampling on", 5),
    "top_p": honoured("turns sampling on, if below 1", 0.5),
    "typical_p": honoured("turns sampling on", 0.5),
    "min_p": honoured("ours; turns sampling on", 0.1),
    "do_sample": honoured("turns sampling on", True),
    "max_new_tokens": honoured("the length", 5),
    "ignore_eos_token": honoured("goes on after it", True),
    "ignore_eos": honoured("vLLM's name of it", True),
    "return_full_text": honoured("the inputs come first", True),
    "stop": honoured("stays in the text, as LoRAX's and TGI's does", ["x"]),
    "truncate": honoured("keeps the last tokens", 5),
    "details": honoured("tokens, counts, reason", True),
    "decoder_input_details": honoured("the prompt's tokens with log-probabilities", True),
    "return_k_alternatives": honoured("up to 20, within each token", 2, details=True),
    "top_n_tokens": honoured("TGI's: the same, beside the tokens", 2, details=True),
    "apply_chat_template": honoured("the inputs are one message of a user", True),
    "seed": honoured("the same again", 5),
    "watermark": honoured("Kirchenbauer's, found with the key of the settings", True),
    "response_format": honoured("LoRAX's, OpenAI's and TGI's", {"type": "json_object"}),
    "grammar": honoured("TGI's response_format", {"type": "regex", "value": "a"}),
}
NAMED = {
    name: BOTH[name]
    for name in ("model", "adapter_source", "merged_adapters", "api_token", "timeout")
}
POOLED = {
    "pooling": honoured("ours: of the last token, or the mean", "mean"),
    "normalize": honoured("vLLM's and TEI's: false leaves the length as it is", False),
}
EMBEDDING = (
    NAMED
    | POOLED
    | {
        "input": honoured("texts and token ids, one or several", ["a", [1, 2]]),
        "encoding_format": honoured("numbers or base64 of float32", "base64"),
        "dimensions": refused("but for all of them: the models are not trained for fewer", 1),
        "add_special_tokens": honoured(
            "vLLM's: those that the tokenizer puts around a text", False
        ),
        "user": ignored("names an end user, for abuse reports", "me"),
    }
)
OF_LORAX = {
    name: LORAX_PARAMETERS[name]
    for name in ("adapter_id", "adapter_source", "merged_adapters", "api_token", "timeout")
}
EXTRACTION = (
    OF_LORAX
    | POOLED
    | {
        "inputs": honoured("a text or several", ["a", "b"]),
        "dimensions": refused("but for all of them: the models are not trained for fewer", 1),
        "truncate": refused("too long a text is an error", True),
        "truncation_direction": refused("other than left and right there are none", "up"),
        "prompt_name": refused("is for models that come with prompts", "query"),
        "encoding_format": refused("numbers are all that there is here", "base64"),
    }
)


class Route(NamedTuple):
    """parameters  whether the fields are those of `parameters` in the body"""

    request: type[msgspec.Struct]
    understand: Callable[[bytes, Authorization | None], Call | HttpReply]
    least: dict[str, Any]
    fields: dict[str, Field]
    parameters: bool = False

    @property
    def is_loraxs(self) -> bool:
        return "inputs" in self.least

    @property
    def embeds(self) -> bool:
        return self.understand.__self__ is EMBEDDINGS  # type: ignore[attr-defined]

    def body(self, changes: dict[str, Any]) -> bytes:
        if self.embeds:
            given = {"parameters": changes} if self.parameters else changes
            return json.dumps({**self.least, **given}).encode()
        # none that is drawn, so that two are alike; none that best_of does not allow
        given = changes if {"seed", "best_of"} & changes.keys() else {"seed": 1, **changes}
        if self.parameters:
            return json.dumps({**self.least, "parameters": given}).encode()
        return json.dumps({**self.least, **given}).encode()

    def refuses(self, outcome: Call | HttpReply, name: str) -> bool:
        assert isinstance(outcome, HttpReply)
        error = json_of(outcome)["error"]
        if self.is_loraxs:
            return outcome.status == 422 and f"`{name}` " in str(error)
        return outcome.status == 400 and bool(error["param"] == name)


ROUTES = {
    "/v1/chat/completions": Route(
        ChatRequest,
        OPENAI.chat,
        {"model": "", "messages": [{"role": "user", "content": "Hi"}]},
        CHAT,
    ),
    "/v1/completions": Route(
        CompletionRequest, OPENAI.completion, {"model": "", "prompt": "Hi"}, COMPLETION
    ),
    **{
        path: Route(Parameters, understand, {"inputs": "Hi"}, LORAX_PARAMETERS, parameters=True)
        for path, understand in (
            ("/", LORAX.compatible),  # and /invocations
            ("/generate", LORAX.generate),
            ("/generate_stream", LORAX.generate_stream),
        )
    },
    "/v1/embeddings": Route(
        EmbeddingRequest, EMBEDDINGS.openai, {"model": "", "input": "Hi"}, EMBEDDING
    ),
    "/embed": Route(
        EmbedParameters, EMBEDDINGS.lorax, {"inputs": "Hi"}, OF_LORAX | POOLED, parameters=True
    ),
    "/pipeline/feature-extraction": Route(
        FeatureExtractionRequest, EMBEDDINGS.feature_extraction, {"inputs": "Hi"}, EXTRACTION
    ),
}
# What only replies in one piece have: refused in streams.
WHOLE = ("best_of", "decoder_input_details")
# The fields of bodies that hold little else, for which the tests of their routes speak.
OTHER_FIELDS: list[tuple[type[msgspec.Struct], Sequence[str]]] = [
    (Request, ("inputs", "parameters", "stream")),
    (EmbedRequest, ("inputs", "parameters")),
    (Inputs, ("inputs", "add_special_tokens")),
]
CASES = [
    pytest.param(route, name, field, id=f"{path} {name}")
    for path, route in ROUTES.items()
    for name, field in route.fields.items()
]


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_of_a_route_is_in_the_table(path: str) -> None:
    route = ROUTES[path]
    names = [field.encode_name for field in msgspec.structs.fields(route.request)]
    assert sorted(names) == sorted(route.fields)
    assert all(field.why for field in route.fields.values())


@pytest.mark.parametrize(("route", "name", "field"), CASES)
def test_what_the_table_says_of_a_field_is_so(route: Route, name: str, field: Field) -> None:
    without = asked(route, field.beside)
    outcome = understood(route, {**field.beside, name: field.example})
    if route.understand == LORAX.generate_stream and (name in WHOLE or field.what == "refused"):
        assert isinstance(outcome, HttpReply)
        assert f"`{name}` " in outcome.body.decode()
        return
    match field.what:
        case "refused":
            assert route.refuses(outcome, name)
        case "honoured":
            assert outlined(outcome) != without
        case "ignored":
            assert outlined(outcome) == without


@pytest.mark.parametrize("path", ROUTES)
def test_a_field_that_no_route_knows_is_refused_by_openais_and_ignored_by_loraxs(
    path: str,
) -> None:
    route = ROUTES[path]
    outcome = understood(route, {"no_such_field": 1})
    if route.is_loraxs:
        assert outlined(outcome) == asked(route, {})
    else:
        assert route.refuses(outcome, "no_such_field")


@pytest.mark.parametrize(("request_type", "names"), OTHER_FIELDS)
def test_other_bodies_have_no_other_fields(
    request_type: type[msgspec.Struct], names: Sequence[str]
) -> None:
    assert [field.encode_name for field in msgspec.structs.fields(request_type)] == list(names)


def understood(route: Route, changes: dict[str, Any]) -> Call | HttpReply:
    return route.understand(route.body(changes), None)


def asked(route: Route, changes: dict[str, Any]) -> Any:
    return outlined(understood(route, changes))


def outlined(call: Call | HttpReply) -> Any:
    """All that a request asks for, and how its reply is written down; no seed that was drawn."""
    assert isinstance(call, Call), call
    prompt = call.prompt
    if prompt.choices > 1:
        sampling = msgspec.structs.replace(prompt.sampling, seed=1)
        prompt = msgspec.structs.replace(prompt, sampling=sampling)
    return (prompt, call.others, call.streamed, call.timeout, written(call))


def written(call: Call) -> Any:
    """A reply of one token to each choice, without what is different each time."""
    tops = (Alternative(1, "a", -0.5), Alternative(2, "b", -1.5))
    top = call.prompt.logprobs.top if call.prompt.logprobs is not None else 0
    detail = TokenDetail(1, "a", -0.5, False, tops[:top])
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    pieces, end = [Piece(1, "a", (detail,))], End(1, FinishReason.EOS, usage)
    if call.prompt.pooling is not None:
        assert isinstance(call.shape, WholeShape)
        return embedded(call.shape, inputs=1 + len(call.others))
    if isinstance(call.shape, WholeShape):
        prompts = (call.prompt, *call.others)
        choices = sum(one.choices for one in prompts)
        told = PromptDetails(1, "Hi", (detail,)) if call.prompt.prompt_details else None
        parts = [Part(choice, pieces, end, told) for choice in range(choices)]
        replies = [read(call.shape.whole(parts))]
    else:
        chunks = [one for one in streamed(call.shape, *pieces, last=end) if one != "[DONE]"]
        replies = [json_of(call.shape.whole(pieces, end)), *chunks]
    for reply in replies:
        if isinstance(reply, dict):
            reply.pop("id", None)
            reply.pop("created", None)
    return replies


def embedded(shape: WholeShape, *, inputs: int) -> Any:
    """A reply of the same embedding for each input."""
    vector = array("f", [0.5, 0.25]).tobytes()
    usage = Usage(prompt_tokens=1, completion_tokens=0)
    end = End(1, FinishReason.EMBEDDED, usage, embedding=vector)
    return read(shape.whole([Part(at, [], end) for at in range(inputs)]))


def read(reply: HttpReply | PiecewiseReply) -> Any:
    return json_of(reply) if isinstance(reply, HttpReply) else json.loads(b"".join(reply.pieces))
