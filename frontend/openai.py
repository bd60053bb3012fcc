"""OpenAI's requests: what they say, what of it is honoured, and the Call that comes of it."""

import re
from array import array
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from frontend.adapters import AdapterNames, Wanted, source_token, tenant_of
from frontend.authorization import Authorization
from frontend.calls import Call
from frontend.chat_options import chat_options
from frontend.deadlines import Seconds
from frontend.exchange import Headers, HttpReply
from frontend.merges import MergedAdapters, merged
from frontend.openai_choices import Choices, Shown
from frontend.openai_logprobs import ChatLogprobs, CompletionLogprobs
from frontend.openai_replies import (
    ChatShape,
    CompletionShape,
    Identity,
    Shape,
    http_error,
    refusal,
)
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
from pipeline.choices import seed_of
from pipeline.errors import RequestError
from pipeline.messages import (
    MAX_TOP_LOGPROBS,
    Grammar,
    GrammarKind,
    Logprobs,
    Prompt,
    Sampling,
    ToolChoice,
    Tools,
)

MAX_BIASES = 300  # OpenAI's
MAX_TOKEN_ID = (1 << 31) - 1
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat goes on as long as it fits

# Options that change the answer and are not implemented -> the values that ask for nothing.
# null asks for nothing everywhere.
NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
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
Top = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Count = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]


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


class AdapterFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How a request names its adapter. A field that is not here or below is refused."""

    model: str
    # not OpenAI's
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    timeout: Seconds | None = None  # see frontend.deadlines


class Request(AdapterFields, kw_only=True):
    """What both routes take."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: Count | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    n: Count | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=MAX_BIASES)] | None = None
    # not OpenAI's
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] | None = None  # -1 and 0: off
    min_p: Probability | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    ignore_eos: bool | None = None
    ignore_eos_token: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None
    stop_token_ids: list[TokenId] | None = None
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
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    # vLLM's, see chat_options
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    tool_prompt: str | None = None  # LoRAX's
    # see NOT_IMPLEMENTED
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
    max_tokens: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] | None = None  # 0: the prompt alone
    echo: bool | None = None
    logprobs: Top | None = None
    best_of: Count | None = None
    # see NOT_IMPLEMENTED
    suffix: Any = None


class OpenAI:
    """The OpenAI family of routes.

    base_model   the id that the base model is listed under
    max_choices  of all prompts of a request together
    """

    def __init__(
        self,
        *,
        base_model: str,
        adapters: AdapterNames,
        max_stop_sequences: int,
        max_choices: int,
        allow_chat_template: bool = False,
    ) -> None:
        self._allow_chat_template = allow_chat_template
        self._base_model = base_model
        self._adapters = adapters
        self._max_stop_sequences = max_stop_sequences
        self._max_choices = max_choices
        self._chats = msgspec.json.Decoder(ChatRequest)
        self._completions = msgspec.json.Decoder(CompletionRequest)

    def http_error(self, status: int, message: str, headers: Headers = ()) -> HttpReply:
        """See calls.Dialect."""
        return http_error(status, message, headers)

    def refusal(self, error: RequestError) -> HttpReply:
        """See calls.Dialect."""
        return refusal(error)

    def chat(self, body: bytes, authorization: Authorization | None) -> Call | HttpReply:
        """What a chat asks for, or why it cannot be had."""
        return understand(lambda: self._chat(decode(self._chats, body), authorization))

    def completion(self, body: bytes, authorization: Authorization | None) -> Call | HttpReply:
        """What a completion asks for, or why it cannot be had."""
        return understand(lambda: self._completion(decode(self._completions, body), authorization))

    def _chat(self, request: ChatRequest, authorization: Authorization | None) -> Call:
        prompt = self._prompt(request, authorization)
        logprobs = _chat_logprobs(request)
        prompt = msgspec.structs.replace(
            prompt,
            chat=_messages(request.messages),
            max_tokens=_max_chat_tokens(request),
            logprobs=logprobs,
            token_details=logprobs is not None,
            choices=self._checked_choices("n", request.n or 1),
            chat_options=chat_options(request, allow_template=self._allow_chat_template),
            tools=_tools(request, prompt.grammar),
        )
        _check_min_tokens(prompt)
        model, identity = request.model or self._base_model, Identity()
        shapes: list[Shape] = [
            ChatShape(
                model=model,
                include_usage=_include_usage(request),
                index=index,
                identity=identity,
                logprobs=None if logprobs is None else ChatLogprobs(),
                may_call=prompt.tools is not None,
            )
            for index in range(prompt.choices)
        ]
        return _call(request, [prompt], shapes, Shown(made=prompt.choices, shown=prompt.choices))

    def _completion(self, request: CompletionRequest, authorization: Authorization | None) -> Call:
        texts = prompts_of(request.prompt)
        shown = _shown(request, prompts=len(texts))
        self._checked_choices("best_of" if request.best_of else "n", shown.prompts * shown.made)
        wanted = request.max_tokens
        prompt = msgspec.structs.replace(
            self._prompt(request, authorization),
            max_tokens=DEFAULT_COMPLETION_TOKENS if wanted is None else max(1, wanted),
            logprobs=_completion_logprobs(request, ranked=shown.made > shown.shown),
            prompt_details=bool(request.echo),
            choices=shown.made,
        )
        _check_min_tokens(prompt)
        prompt = msgspec.structs.replace(prompt, token_details=prompt.logprobs is not None)
        prompts = [
            _one_of(prompt, one, first_choice=at * shown.made) for at, one in enumerate(texts)
        ]
        model, identity, top = request.model or self._base_model, Identity(), request.logprobs
        shapes: list[Shape] = [
            CompletionShape(
                model=model,
                include_usage=_include_usage(request),
                index=index,
                identity=identity,
                logprobs=None if top is None else CompletionLogprobs(top),
            )
            for index in range(shown.prompts * shown.shown)
        ]
        return _call(request, prompts, shapes, shown)

    def _checked_choices(self, parameter: str, choices: int) -> int:
        if choices > self._max_choices:
            raise ParameterError(
                parameter,
                f"a request has {self._max_choices} choices at most, of all prompts together. "
                f"Given: {choices}",
            )
        return choices

    def _prompt(self, request: Request, authorization: Authorization | None) -> Prompt:
        """All of it but what is to be continued, and how far."""
        _check_implemented(request, NOT_IMPLEMENTED)
        wanted = wanted_adapter(self._adapters, request, authorization)
        return Prompt(
            request_id=0,
            arrived=0.0,
            adapter=wanted.key if wanted else None,
            adapter_token=wanted.token if wanted else None,
            sampling=_sampling(request),
            stop=stop_strings(request.stop, self._max_stop_sequences),
            ignore_eos=bool(request.ignore_eos or request.ignore_eos_token),
            tenant=tenant_of(request.api_token, authorization),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            grammar=_grammar(request),
        )


def wanted_adapter(
    adapters: AdapterNames, request: AdapterFields, authorization: Authorization | None
) -> Wanted | None:
    """What the request names. Raises RequestError."""
    token = source_token(request.api_token, authorization)

    def find(name: str) -> Wanted | None:
        return adapters.find(name, source=request.adapter_source, token=token, parameter="model")

    stands_in = request.adapter_source is None and adapters.is_stand_in(request.model)
    named = None if stands_in else find(request.model)
    if request.merged_adapters is None:
        return named
    if named is not None:
        raise ParameterError(
            "merged_adapters", "with `merged_adapters`, `model` must be the base model"
        )
    return merged(request.merged_adapters, find)


def understand(read: Callable[[], Call]) -> Call | HttpReply:
    """What is read, or why it cannot be."""
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


def _call(request: Request, prompts: list[Prompt], shapes: list[Shape], shown: Shown) -> Call:
    """One choice and nothing special is what most ask for, and takes the shortest way."""
    prompt, *others = prompts
    plain = shown == Shown() and not prompt.prompt_details
    shape = shapes[0] if plain else Choices(shapes, shown)
    return Call(prompt, shape, bool(request.stream), tuple(others), timeout=request.timeout)


def _chat_logprobs(request: ChatRequest) -> Logprobs | None:
    if request.logprobs:
        return Logprobs(request.top_logprobs or 0)
    if request.top_logprobs:
        raise ParameterError("top_logprobs", "`top_logprobs` is allowed with `logprobs` only")
    return None


def _completion_logprobs(request: CompletionRequest, *, ranked: bool) -> Logprobs | None:
    if request.logprobs is None:
        return Logprobs() if ranked else None
    return Logprobs(request.logprobs, request.logprobs if request.echo else None)


def _shown(request: CompletionRequest, *, prompts: int) -> Shown:
    shown = request.n or 1
    made = request.best_of or shown
    if made < shown:
        raise ParameterError(
            "best_of", f"`best_of` must be at least `n`. Given: {made} and {shown}"
        )
    if made > shown and request.stream:
        raise ParameterError(
            "best_of", "`best_of` above `n` is not supported when streaming: the best is not known"
        )
    return Shown(prompts=prompts, made=made, shown=shown, silent=request.max_tokens == 0)


def _check_min_tokens(prompt: Prompt) -> None:
    least, most = prompt.sampling.min_tokens, prompt.max_tokens
    if most is not None and least > most:
        raise ParameterError(
            "min_tokens", f"`min_tokens` must be <= `max_tokens`. Given: {least} and {most}"
        )


def _logit_bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for name, value in given.items():
        if not re.fullmatch("[0-9]{1,10}", name) or int(name) > MAX_TOKEN_ID:
            raise ParameterError(
                "logit_bias", f"`logit_bias` is by token id, as a string of digits. Given: `{name}`"
            )
        biases[int(name)] = value
    return tuple(biases.items())


def _one_of(prompt: Prompt, one: str | bytes, *, first_choice: int) -> Prompt:
    """One of a request's prompts, which may be equal; but no two choices have the same seed."""
    seed = seed_of(prompt.sampling.seed, first_choice)
    return msgspec.structs.replace(
        prompt,
        text=one if isinstance(one, str) else None,
        token_ids=None if isinstance(one, str) else one,
        sampling=msgspec.structs.replace(prompt.sampling, seed=seed),
    )


def prompts_of(
    prompt: str | list[str | int | list[int]], parameter: str = "prompt"
) -> list[str | bytes]:
    """Each a text or token ids (int32[n]): a prompt may be one of these, or a list of them."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ParameterError(parameter, f"`{parameter}` cannot be empty")
    if all(isinstance(one, int) for one in prompt):
        return [array("i", [one for one in prompt if isinstance(one, int)]).tobytes()]
    return [_prompt_of(one, parameter) for one in prompt]


def _prompt_of(one: str | int | list[int], parameter: str) -> str | bytes:
    if isinstance(one, int):
        raise ParameterError(parameter, f"`{parameter}` mixes token ids with other things")
    if not one:
        raise ParameterError(parameter, f"`{parameter}` cannot hold empty {parameter}s")
    return one if isinstance(one, str) else array("i", one).tobytes()


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
        logit_bias=_logit_bias(request.logit_bias or {}),
        min_tokens=request.min_tokens or 0,
        seed=random_seed() if request.seed is None else request.seed & MAX_SEED,
    )


def _include_usage(request: Request) -> bool:
    if request.stream_options is None:
        return False
    if not request.stream:
        raise ParameterError("stream_options", "`stream_options` is allowed with `stream` only")
    return request.stream_options.include_usage
