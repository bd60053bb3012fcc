"""LoRAX's requests: what they say, what of it is honoured, and the Call that comes of it."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from frontend.adapters import AdapterNames, UnknownSource, Wanted, source_token, tenant_of
from frontend.authorization import Authorization
from frontend.calls import Call
from frontend.deadlines import Seconds
from frontend.exchange import Headers, HttpReply
from frontend.lorax_choices import LoraxChoices
from frontend.lorax_replies import Asked, LoraxShape, http_error, not_understood, refusal
from frontend.merges import MergedAdapters, check_weights, merged
from frontend.parameters import (
    MAX_SEED,
    MalformedJson,
    ParameterError,
    decode,
    random_seed,
    stop_strings,
)
from frontend.structured import ResponseFormat
from pipeline.errors import RequestError
from pipeline.messages import (
    MAX_TOP_LOGPROBS,
    FailureKind,
    Grammar,
    Logprobs,
    Prompt,
    Sampling,
)

T = TypeVar("T")

Unsigned = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


class AdapterParameters(msgspec.Struct, kw_only=True):
    """Which adapter; null is the same as leaving a field out. Unknown fields are ignored."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
    timeout: Seconds | None = None  # ours, see frontend.deadlines


class Parameters(AdapterParameters, kw_only=True):
    """As LoRAX's."""

    best_of: Unsigned | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: Unsigned | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    stop: str | list[str] | None = None
    truncate: Unsigned | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = None
    apply_chat_template: bool | None = None
    seed: int | None = None
    # TGI's: return_k_alternatives, told in another place
    top_n_tokens: Unsigned | None = None
    # neither's
    min_p: float | None = None
    ignore_eos: bool | None = None
    grammar: ResponseFormat | None = None  # TGI's name for response_format
    response_format: ResponseFormat | None = None


class Request(msgspec.Struct, kw_only=True):
    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None  # looked at by POST / alone


class Lorax:
    """The LoRAX family of routes, which are TGI's too.

    base_model    the id of the base model
    max_best_of   replies that one is chosen from
    compute_type  gives what the server runs on, once that is known
    """

    def __init__(
        self,
        *,
        base_model: str,
        adapters: AdapterNames,
        max_stop_sequences: int,
        max_best_of: int,
        compute_type: Callable[[], str],
    ) -> None:
        self._base_model = base_model
        self._adapters = adapters
        self._max_stop_sequences = max_stop_sequences
        self._max_best_of = max_best_of
        self._compute_type = compute_type
        self._requests = msgspec.json.Decoder(Request)

    def http_error(self, status: int, message: str, headers: Headers = ()) -> HttpReply:
        """See calls.Dialect."""
        return http_error(status, message, headers)

    def refusal(self, error: RequestError) -> HttpReply:
        """See calls.Dialect."""
        return refusal(error, streamed=False)

    def compatible(self, body: bytes, authorization: Authorization | None) -> Call | HttpReply:
        """POST /: streamed if it says so, else a list of one reply."""
        return self._understand(body, authorization, streamed=None)

    def generate(self, body: bytes, authorization: Authorization | None) -> Call | HttpReply:
        """POST /generate"""
        return self._understand(body, authorization, streamed=False)

    def generate_stream(self, body: bytes, authorization: Authorization | None) -> Call | HttpReply:
        """POST /generate_stream"""
        return self._understand(body, authorization, streamed=True)

    def _understand(
        self, body: bytes, authorization: Authorization | None, *, streamed: bool | None
    ) -> Call | HttpReply:
        request = read(self._requests, body)
        if isinstance(request, HttpReply):
            return request
        stream = bool(request.stream) if streamed is None else streamed
        try:
            return self._call(request, authorization, streamed=stream, in_list=streamed is None)
        except RequestError as error:
            return refusal(as_told(error), streamed=stream)

    def _call(
        self,
        request: Request,
        authorization: Authorization | None,
        *,
        streamed: bool,
        in_list: bool,
    ) -> Call:
        parameters = request.parameters or Parameters()
        self._check_first(parameters, streamed=streamed)
        sampling = _sampling(parameters)
        if parameters.max_new_tokens == 0:
            raise ParameterError("max_new_tokens", "`max_new_tokens` must be strictly positive")
        stop = stop_strings(parameters.stop, self._max_stop_sequences)
        best_of = parameters.best_of or 1
        if best_of > 1 and parameters.seed is not None:
            raise ParameterError("seed", "`seed` must not be set when `best_of` > 1")
        if not request.inputs:
            raise ParameterError("inputs", "`inputs` cannot be empty")
        wanted = wanted_adapter(self._adapters, parameters, authorization)
        scored = bool(parameters.decoder_input_details)
        details = scored or bool(parameters.details)
        tokens = streamed or details or best_of > 1
        alternatives, top = parameters.return_k_alternatives or 0, parameters.top_n_tokens or 0
        is_chat = bool(parameters.apply_chat_template)
        prompt = Prompt(
            request_id=0,
            arrived=0.0,
            text=None if is_chat else request.inputs,
            chat=[{"role": "user", "content": request.inputs}] if is_chat else None,
            adapter=wanted.key if wanted else None,
            adapter_token=wanted.token if wanted else None,
            sampling=sampling,
            max_tokens=parameters.max_new_tokens,
            stop=stop,
            keep_stop=True,
            ignore_eos=bool(parameters.ignore_eos_token or parameters.ignore_eos),
            token_details=tokens,
            logprobs=Logprobs(max(alternatives, top), 0 if scored else None) if tokens else None,
            tenant=tenant_of(parameters.api_token, authorization),
            prompt_details=scored,
            choices=best_of,
            truncate=parameters.truncate,
            grammar=_grammar(parameters),
        )
        asked = Asked(
            inputs=request.inputs,
            model_id=self._base_model,
            compute_type=self._compute_type(),
            adapter=prompt.adapter,
            seed=sampling.seed if sampling.temperature else None,
            details=details,
            full_text=bool(parameters.return_full_text),
            streamed=streamed,
            in_list=in_list,
            alternatives=alternatives,
            top_tokens=top,
        )
        shape = LoraxShape(asked)
        plain = best_of == 1 and not scored
        shape_of_all = shape if plain else LoraxChoices(shape)
        return Call(prompt, shape_of_all, streamed, timeout=parameters.timeout)

    def _check_first(self, parameters: Parameters, *, streamed: bool) -> None:
        """What LoRAX looks at before the ranges, in its order. Raises ParameterError."""
        if streamed:
            _check_streamable(parameters)
        best_of, most = parameters.best_of, self._max_best_of
        if best_of is not None and best_of > 1 and most == 1:
            raise ParameterError("best_of", "`best_of` != 1 is not allowed for this endpoint")
        if best_of is not None and not 0 < best_of <= most:
            raise ParameterError(
                "best_of", f"`best_of` must be > 0 and <= {most}. Given: {best_of}"
            )
        check_adapters(parameters)


def check_adapters(parameters: AdapterParameters) -> None:
    """That they name one adapter at most. Raises ParameterError."""
    if parameters.merged_adapters is None:
        return
    if parameters.adapter_id:
        raise ParameterError(
            "merged_adapters", "at most one of `adapter_id` or `adapters` may be provided"
        )
    check_weights(parameters.merged_adapters)


def wanted_adapter(
    adapters: AdapterNames, parameters: AdapterParameters, authorization: Authorization | None
) -> Wanted | None:
    """What they name. Raises RequestError."""
    token = source_token(parameters.api_token, authorization)

    def find(name: str | None) -> Wanted | None:
        return adapters.find(
            name, source=parameters.adapter_source, token=token, parameter="adapter_id"
        )

    if parameters.merged_adapters is None:
        return find(parameters.adapter_id)
    return merged(parameters.merged_adapters, find)


def read(decoder: msgspec.json.Decoder[T], body: bytes) -> T | HttpReply:
    """What a body holds, or what is wrong with it."""
    try:
        return decode(decoder, body)
    except MalformedJson as error:
        return http_error(400, str(error))
    except RequestError as error:
        return not_understood(error)


def as_told(error: RequestError) -> RequestError:
    """LoRAX finds out that there is no such source when it is about to load the adapter."""
    if isinstance(error, UnknownSource):
        sentence = f"Server error: {error.message}"
        return RequestError(424, FailureKind.ADAPTER_UNAVAILABLE, sentence)
    return error


def _grammar(parameters: Parameters) -> Grammar | None:
    if parameters.response_format is not None and parameters.grammar is not None:
        raise ParameterError("grammar", "`grammar` and `response_format` are the same; give one")
    if parameters.grammar is not None:
        return parameters.grammar.grammar("grammar")
    if parameters.response_format is not None:
        return parameters.response_format.grammar("response_format")
    return None


def _check_streamable(parameters: Parameters) -> None:
    if parameters.best_of not in (None, 1):
        raise ParameterError("best_of", "`best_of` != 1 is not supported when streaming tokens")
    if parameters.decoder_input_details:
        raise ParameterError(
            "decoder_input_details",
            "`decoder_input_details` == true is not supported when streaming tokens",
        )


def _sampling(given: Parameters) -> Sampling:
    """Greedy, unless sampling is asked for or something is set that means nothing without it.

    A temperature of 1 is such a thing for `best_of` alone: many clients always send one.
    """
    several = (given.best_of or 1) > 1
    temperature = 1.0 if given.temperature is None else given.temperature
    sampled = (
        bool(given.do_sample)
        or temperature != 1
        or (several and given.temperature is not None)
        or given.top_k is not None
        or (given.top_p or 1) < 1
        or given.typical_p is not None
        or bool(given.min_p)
    )
    if several and not (sampled and temperature):
        raise ParameterError("best_of", "you must use sampling when `best_of` is > 1")
    _check_ranges(given)
    return Sampling(
        temperature=temperature if sampled else 0.0,
        top_p=1.0 if given.top_p is None else given.top_p,
        top_k=given.top_k or 0,
        min_p=given.min_p or 0.0,
        typical_p=1.0 if given.typical_p is None else given.typical_p,
        repetition_penalty=1.0 if given.repetition_penalty is None else given.repetition_penalty,
        frequency_penalty=given.frequency_penalty or 0.0,
        presence_penalty=given.presence_penalty or 0.0,
        seed=random_seed() if given.seed is None else given.seed,
        watermark=bool(given.watermark),
    )


def _check_ranges(given: Parameters) -> None:
    """LoRAX's ranges and sentences, in its order; raises ParameterError."""
    _check("temperature", given.temperature, lambda t: t >= 0, "must be non-negative")
    _check(
        "repetition_penalty", given.repetition_penalty, lambda p: p > 0, "must be strictly positive"
    )
    for name in ("frequency_penalty", "presence_penalty"):
        _check(name, getattr(given, name), lambda p: -2 <= p <= 2, "must be >= -2.0 and <= 2.0")
    _check("top_p", given.top_p, lambda p: 0 < p <= 1, "must be > 0.0 and < 1.0")
    _check("typical_p", given.typical_p, lambda p: 0 < p < 1, "must be > 0.0 and < 1.0")
    _check("min_p", given.min_p, lambda p: 0 <= p <= 1, "must be >= 0.0 and <= 1.0")
    _check("top_k", given.top_k, lambda k: 0 < k < 1 << 31, "must be strictly positive")
    alternatives, most = given.return_k_alternatives, MAX_TOP_LOGPROBS
    _check("return_k_alternatives", alternatives, lambda k: k > 0, "must be strictly positive")
    sentence = f"must be <= {most}. Given: {alternatives}"
    _check("return_k_alternatives", alternatives, lambda k: k <= most, sentence)
    sentence = f"must be >= 0 and <= {most}. Given: {given.top_n_tokens}"
    _check("top_n_tokens", given.top_n_tokens, lambda n: n <= most, sentence)
    _check("seed", given.seed, lambda s: 0 <= s <= MAX_SEED, "must be an unsigned 64-bit integer")


def _check(name: str, value: float | None, holds: Callable[[float], bool], sentence: str) -> None:
    if value is not None and not holds(value):
        raise ParameterError(name, f"`{name}` {sentence}")
