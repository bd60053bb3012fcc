"""LoRAX's requests: what they say, what of it is honoured, and the Call that comes of it."""

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from frontend.adapters import AdapterNames, UnknownSource, Wanted, source_token, tenant_of
from frontend.authorization import Authorization
from frontend.calls import Call
from frontend.exchange import Headers, HttpReply
from frontend.lorax_replies import Asked, LoraxShape, http_error, refusal
from frontend.merges import MergedAdapters, merged
from frontend.parameters import (
    MAX_SEED,
    MalformedJson,
    ParameterError,
    decode,
    is_neutral,
    random_seed,
    stop_strings,
)
from pipeline.errors import RequestError
from pipeline.messages import FailureKind, Logprobs, Prompt, Sampling

Unsigned = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]

# Options that change the answer and are not implemented -> the values that ask for nothing.
# null asks for nothing everywhere. best_of has sentences of its own.
NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "truncate": (),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "return_k_alternatives": (),
    "apply_chat_template": (False,),
    "response_format": (),
}


class Parameters(msgspec.Struct, kw_only=True):
    """As LoRAX's; null is the same as leaving a field out. Unknown fields are ignored."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None
    api_token: str | None = None
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
    details: bool | None = None
    seed: int | None = None
    # not LoRAX's
    min_p: float | None = None
    ignore_eos: bool | None = None
    # see NOT_IMPLEMENTED
    truncate: Any = None
    watermark: Any = None
    decoder_input_details: Any = None
    return_k_alternatives: Any = None
    apply_chat_template: Any = None
    response_format: Any = None


class Request(msgspec.Struct, kw_only=True):
    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None  # looked at by POST / alone


class Lorax:
    """The LoRAX family of routes.

    base_model    the id of the base model
    compute_type  gives what the server runs on, once that is known
    """

    def __init__(
        self,
        *,
        base_model: str,
        adapters: AdapterNames,
        max_stop_sequences: int,
        compute_type: Callable[[], str],
    ) -> None:
        self._base_model = base_model
        self._adapters = adapters
        self._max_stop_sequences = max_stop_sequences
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
        try:
            request = decode(self._requests, body)
        except MalformedJson as error:
            return http_error(400, str(error))
        except RequestError as error:
            sentence = "Failed to deserialize the JSON body into the target type: "
            return http_error(422, sentence + error.message)
        stream = bool(request.stream) if streamed is None else streamed
        try:
            return self._call(request, authorization, streamed=stream, in_list=streamed is None)
        except UnknownSource as error:
            failed = RequestError(
                424, FailureKind.ADAPTER_UNAVAILABLE, f"Server error: {error.message}"
            )
            return refusal(failed, streamed=stream)
        except RequestError as error:
            return refusal(error, streamed=stream)

    def _call(
        self,
        request: Request,
        authorization: Authorization | None,
        *,
        streamed: bool,
        in_list: bool,
    ) -> Call:
        parameters = request.parameters or Parameters()
        _check_implemented(parameters, streamed=streamed)
        sampling = _sampling(parameters)
        if parameters.max_new_tokens == 0:
            raise ParameterError("max_new_tokens", "`max_new_tokens` must be strictly positive")
        stop = stop_strings(parameters.stop, self._max_stop_sequences)
        if not request.inputs:
            raise ParameterError("inputs", "`inputs` cannot be empty")
        wanted = self._wanted(parameters, authorization)
        prompt = Prompt(
            request_id=0,
            arrived=0.0,
            text=request.inputs,
            adapter=wanted.key if wanted else None,
            adapter_token=wanted.token if wanted else None,
            sampling=sampling,
            max_tokens=parameters.max_new_tokens,
            stop=stop,
            keep_stop=True,
            ignore_eos=bool(parameters.ignore_eos_token or parameters.ignore_eos),
            token_details=streamed or bool(parameters.details),
            logprobs=Logprobs() if streamed or parameters.details else None,
            tenant=tenant_of(parameters.api_token, authorization),
        )
        asked = Asked(
            inputs=request.inputs,
            model_id=self._base_model,
            compute_type=self._compute_type(),
            adapter=prompt.adapter,
            seed=sampling.seed if sampling.temperature else None,
            details=bool(parameters.details),
            full_text=bool(parameters.return_full_text),
            streamed=streamed,
            in_list=in_list,
        )
        return Call(prompt, LoraxShape(asked), streamed)

    def _wanted(self, parameters: Parameters, authorization: Authorization | None) -> Wanted | None:
        token = source_token(parameters.api_token, authorization)

        def find(name: str | None) -> Wanted | None:
            return self._adapters.find(
                name, source=parameters.adapter_source, token=token, parameter="adapter_id"
            )

        if parameters.merged_adapters is None:
            return find(parameters.adapter_id)
        if parameters.adapter_id:
            raise ParameterError(
                "merged_adapters", "at most one of `adapter_id` or `adapters` may be provided"
            )
        return merged(parameters.merged_adapters, find)


def _check_implemented(parameters: Parameters, *, streamed: bool) -> None:
    best_of = parameters.best_of
    if best_of not in (None, 1):
        if streamed:
            sentence = "`best_of` != 1 is not supported when streaming tokens"
        elif best_of == 0:
            sentence = "`best_of` must be > 0 and <= 1. Given: 0"
        else:
            sentence = "`best_of` != 1 is not allowed for this endpoint"
        raise ParameterError("best_of", sentence)
    if streamed and parameters.decoder_input_details:
        raise ParameterError(
            "decoder_input_details",
            "`decoder_input_details` == true is not supported when streaming tokens",
        )
    for name, neutral in NOT_IMPLEMENTED.items():
        if not is_neutral(getattr(parameters, name), neutral):
            raise ParameterError(name, f"`{name}` is not supported")


def _sampling(given: Parameters) -> Sampling:
    """Greedy, unless sampling is asked for or something is set that means nothing without it."""
    _check_ranges(given)
    temperature = 1.0 if given.temperature is None else given.temperature
    sampled = (
        bool(given.do_sample)
        or temperature != 1
        or given.top_k is not None
        or (given.top_p or 1) < 1
        or given.typical_p is not None
        or bool(given.min_p)
    )
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
    _check("seed", given.seed, lambda s: 0 <= s <= MAX_SEED, "must be an unsigned 64-bit integer")


def _check(name: str, value: float | None, holds: Callable[[float], bool], sentence: str) -> None:
    if value is not None and not holds(value):
        raise ParameterError(name, f"`{name}` {sentence}")
