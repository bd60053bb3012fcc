"""OpenAI's requests: what they say, what of it is honoured, and the Call that comes of it."""

from array import array
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from frontend.adapters import AdapterNames, Wanted, source_token, tenant_of
from frontend.calls import Call
from frontend.exchange import Headers, HttpReply
from frontend.merges import MergedAdapters, merged
from frontend.openai_replies import ChatShape, CompletionShape, http_error, refusal
from frontend.parameters import (
    MAX_SEED,
    MalformedJson,
    ParameterError,
    decode,
    is_neutral,
    random_seed,
    stop_strings,
)
from frontend.structured import Guided, ResponseFormat, StructuredOutputs, one_grammar
from frontend.tools import Tool, ToolCall, read_tools
from pipeline.errors import RequestError
from pipeline.messages import Grammar, GrammarKind, Prompt, Sampling, ToolChoice, Tools

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat goes on as long as it fits

# Options that change the answer and are not implemented -> the values that ask for nothing.
# null asks for nothing everywhere.
NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_whitespace_pattern": (),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "prediction": (),
}

# The same for what a message can hold besides its text.
EMPTY_IN_MESSAGE: dict[str, tuple[object, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
}

Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message's content. Only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message, also one that comes from an earlier reply with all of its empty fields."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None  # of a tool's
    parsed: Any = None  # ignored: OpenAI's client adds it to what it has parsed
    # see EMPTY_IN_MESSAGE
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: random padding of chunks


class Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both routes take. A field that is not here is refused."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: Count | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    # not OpenAI's
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None  # -1 and 0: off
    min_p: Probability | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    ignore_eos: bool | None = None
    ignore_eos_token: bool | None = None
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    # grammars, see structured
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: Any = None  # ignored: there is one
    # see NOT_IMPLEMENTED
    guided_whitespace_pattern: Any = None
    n: Any = None
    logprobs: Any = None
    logit_bias: Any = None
    # ignored, since they do not change the answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class ChatRequest(Request, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage]
    max_completion_tokens: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    tool_prompt: str | None = None  # LoRAX's
    # see NOT_IMPLEMENTED
    top_logprobs: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    prediction: Any = None


class CompletionRequest(Request, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    # see NOT_IMPLEMENTED
    best_of: Any = None
    suffix: Any = None


class OpenAI:
    """The OpenAI family of routes.

    base_model  the id that the base model is listed under
    """

    def __init__(self, *, base_model: str, adapters: AdapterNames, max_stop_sequences: int) -> None:
        self._base_model = base_model
        self._adapters = adapters
        self._max_stop_sequences = max_stop_sequences
        self._chats = msgspec.json.Decoder(ChatRequest)
        self._completions = msgspec.json.Decoder(CompletionRequest)

    def http_error(self, status: int, message: str, headers: Headers = ()) -> HttpReply:
        """See calls.Dialect."""
        return http_error(status, message, headers)

    def refusal(self, error: RequestError) -> HttpReply:
        """See calls.Dialect."""
        return refusal(error)

    def chat(self, body: bytes, authorization: str | None) -> Call | HttpReply:
        """What a chat asks for, or why it cannot be had."""
        return _understand(lambda: self._chat(decode(self._chats, body), authorization))

    def completion(self, body: bytes, authorization: str | None) -> Call | HttpReply:
        """What a completion asks for, or why it cannot be had."""
        return _understand(lambda: self._completion(decode(self._completions, body), authorization))

    def _chat(self, request: ChatRequest, authorization: str | None) -> Call:
        prompt = self._prompt(request, authorization)
        prompt = msgspec.structs.replace(
            prompt,
            chat=_messages(request.messages),
            max_tokens=_max_chat_tokens(request),
            tools=_tools(request, prompt.grammar),
        )
        shape = ChatShape(
            model=request.model or self._base_model,
            include_usage=_include_usage(request),
            may_call=prompt.tools is not None,
        )
        return Call(prompt, shape, bool(request.stream))

    def _completion(self, request: CompletionRequest, authorization: str | None) -> Call:
        text, token_ids = _one_prompt(request.prompt)
        if request.echo and text is None:
            raise ParameterError("echo", "`echo` needs a prompt that is a string")
        prompt = msgspec.structs.replace(
            self._prompt(request, authorization),
            text=text,
            token_ids=token_ids,
            max_tokens=request.max_tokens or DEFAULT_COMPLETION_TOKENS,
        )
        shape = CompletionShape(
            model=request.model or self._base_model,
            include_usage=_include_usage(request),
            echo=text if request.echo and text else "",
        )
        return Call(prompt, shape, bool(request.stream))

    def _prompt(self, request: Request, authorization: str | None) -> Prompt:
        """All of it but what is to be continued, and how far."""
        _check_implemented(request, NOT_IMPLEMENTED)
        wanted = self._wanted(request, authorization)
        return Prompt(
            request_id=0,
            arrived=0.0,
            adapter=wanted.key if wanted else None,
            adapter_token=wanted.token if wanted else None,
            sampling=_sampling(request),
            stop=stop_strings(request.stop, self._max_stop_sequences),
            ignore_eos=bool(request.ignore_eos or request.ignore_eos_token),
            tenant=tenant_of(request.api_token, authorization),
            grammar=_grammar(request),
        )

    def _wanted(self, request: Request, authorization: str | None) -> Wanted | None:
        token = source_token(request.api_token, authorization)

        def find(name: str) -> Wanted | None:
            return self._adapters.find(
                name, source=request.adapter_source, token=token, parameter="model"
            )

        named = find(request.model)
        if request.merged_adapters is None:
            return named
        if named is not None:
            raise ParameterError(
                "merged_adapters", "with `merged_adapters`, `model` must be the base model"
            )
        return merged(request.merged_adapters, find)


def _understand(read: Callable[[], Call]) -> Call | HttpReply:
    try:
        return read()
    except MalformedJson as error:
        return http_error(400, str(error))
    except RequestError as error:
        return refusal(error)


def _check_implemented(
    given: Request | ChatMessage, neutral: dict[str, tuple[object, ...]], path: str = ""
) -> None:
    for name, values in neutral.items():
        if not is_neutral(getattr(given, name, None), values):
            raise ParameterError(path + name, f"`{path}{name}` is not supported")


def _messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """As the chat template wants them. Only later models know the role `developer`."""
    if not messages:
        raise ParameterError("messages", "`messages` cannot be empty")
    plain = []
    for at, message in enumerate(messages):
        _check_implemented(message, EMPTY_IN_MESSAGE, f"messages[{at}].")
        if message.role == "tool" and message.tool_call_id is None:
            raise ParameterError(
                f"messages[{at}].tool_call_id", f"`messages[{at}].tool_call_id` is missing"
            )
        if message.tool_calls and message.role != "assistant":
            raise ParameterError(
                f"messages[{at}].tool_calls", f"`messages[{at}].tool_calls` is the assistant's"
            )
        if message.content is None and message.role != "assistant":
            raise ParameterError(
                f"messages[{at}].content", f"`messages[{at}].content` cannot be null"
            )
        role = "system" if message.role == "developer" else message.role
        one: dict[str, Any] = {"role": role, "content": msgspec.to_builtins(message.content or "")}
        if message.name is not None:
            one["name"] = message.name
        if message.tool_calls:
            one["tool_calls"] = [call.plain() for call in message.tool_calls]
        if message.tool_call_id is not None:
            one["tool_call_id"] = message.tool_call_id
        plain.append(one)
    return plain


def _grammar(request: Request) -> Grammar | None:
    return one_grammar(
        request.response_format,
        request.structured_outputs,
        Guided(
            json=request.guided_json,
            regex=request.guided_regex,
            choice=request.guided_choice,
            grammar=request.guided_grammar,
        ),
    )


def _tools(request: ChatRequest, grammar: Grammar | None) -> Tools | None:
    """A reply that may be a call or must match a grammar is one or the other."""
    tools = read_tools(
        request.tools,
        request.tool_choice,
        parallel=request.parallel_tool_calls,
        prompt=request.tool_prompt,
    )
    if tools is None or grammar is None or grammar.kind is GrammarKind.JSON_SCHEMA:
        return tools
    if tools.choice is not ToolChoice.NONE:
        raise ParameterError("tools", "`tools` go with JSON schemas only, of all grammars")
    return tools


def _max_chat_tokens(request: ChatRequest) -> int | None:
    """max_tokens is the old name of max_completion_tokens."""
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ParameterError(
            "max_tokens", "`max_tokens` and `max_completion_tokens` say different things"
        )
    return old if new is None else new


def _one_prompt(prompt: str | list[str | int | list[int]]) -> tuple[str | None, bytes | None]:
    """The text or the token ids (int32[n]) of the one prompt that is given."""
    only = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if isinstance(only, str):
        return only, None
    listed = only if isinstance(only, list) else [only]
    if not listed:
        raise ParameterError("prompt", "`prompt` cannot be empty")
    ids = [one for one in listed if isinstance(one, int)]
    if len(ids) == len(listed):
        return None, array("i", ids).tobytes()
    if ids:
        raise ParameterError("prompt", "`prompt` mixes token ids with other things")
    raise ParameterError("prompt", "several prompts in one request are not supported")


def _sampling(request: Request) -> Sampling:
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    if top_p == 0:  # the likeliest token alone
        temperature, top_p = 0.0, 1.0
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        typical_p=1.0 if request.typical_p is None else request.typical_p,
        repetition_penalty=(
            1.0 if request.repetition_penalty is None else request.repetition_penalty
        ),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        seed=random_seed() if request.seed is None else request.seed & MAX_SEED,
    )


def _include_usage(request: Request) -> bool:
    if request.stream_options is None:
        return False
    if not request.stream:
        raise ParameterError("stream_options", "`stream_options` is allowed with `stream` only")
    return request.stream_options.include_usage
