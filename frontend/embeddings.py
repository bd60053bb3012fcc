"""Requests for embeddings: OpenAI's, LoRAX's and those of Hugging Face's feature extraction."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from frontend import lorax, openai
from frontend.adapters import AdapterNames, Wanted, tenant_of
from frontend.authorization import Authorization
from frontend.calls import Call, WholeShape
from frontend.embedding_replies import FeatureExtraction, LoraxEmbedding, OpenAIEmbeddings
from frontend.exchange import HttpReply
from frontend.lorax_replies import refusal
from frontend.openai import TokenId, prompts_of
from frontend.parameters import ParameterError, decode, is_neutral
from pipeline.errors import RequestError
from pipeline.messages import FailureKind, Pooling, PoolingKind, Prompt

MAX_INPUTS = 2048  # OpenAI's
AT_ONCE = 64  # inputs of a request that run: enough for full steps, few enough for others' text


class EmbeddingRequest(openai.AdapterFields, kw_only=True):
    """POST /v1/embeddings"""

    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    # not OpenAI's
    pooling: PoolingKind | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    # ignored, since it does not change the answer
    user: Any = None


class EmbedParameters(lorax.AdapterParameters, kw_only=True):
    """As LoRAX's, and what an embedding is made of."""

    pooling: PoolingKind | None = None
    normalize: bool | None = None


class EmbedRequest(msgspec.Struct, kw_only=True):
    """POST /embed. Unknown fields are ignored, as by all LoRAX routes."""

    inputs: str
    parameters: EmbedParameters | None = None


class FeatureExtractionRequest(EmbedParameters, kw_only=True):
    """POST /pipeline/feature-extraction. Unknown fields are ignored."""

    inputs: str | list[str]
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    # see NOT_IMPLEMENTED
    truncate: Any = None
    truncation_direction: Any = None
    prompt_name: Any = None
    encoding_format: Any = None


# Options that change the answer and are not implemented -> the values that ask for nothing.
NOT_IMPLEMENTED: dict[str, tuple[object, ...]] = {
    "truncate": (False,),
    "truncation_direction": ("left", "right", "Left", "Right"),  # of what is not truncated
    "prompt_name": (),
    "encoding_format": ("float",),
}


class Embeddings:
    """All routes that embed.

    base_model   the id that the base model is listed under
    pooling      where a request does not say
    hidden_size  gives the length of an embedding, once that is known
    at_once      inputs of one request that run
    """

    def __init__(
        self,
        *,
        base_model: str,
        adapters: AdapterNames,
        pooling: PoolingKind,
        hidden_size: Callable[[], object],
        at_once: int = AT_ONCE,
    ) -> None:
        self._base_model = base_model
        self._adapters = adapters
        self._pooling = pooling
        self._hidden_size = hidden_size
        self._at_once = at_once
        self._embeddings = msgspec.json.Decoder(EmbeddingRequest)
        self._embeds = msgspec.json.Decoder(EmbedRequest)
        self._extractions = msgspec.json.Decoder(FeatureExtractionRequest)

    def openai(self, body: bytes, authorization: Authorization | None) -> Call | HttpReply:
        """POST /v1/embeddings"""
        return openai.understand(
            lambda: self._openai(decode(self._embeddings, body), authorization)
        )

    def lorax(self, body: bytes, authorization: Authorization | None) -> Call | HttpReply:
        """POST /embed"""
        request = lorax.read(self._embeds, body)
        if isinstance(request, HttpReply):
            return request
        given = request.parameters or EmbedParameters()
        return self._understand(
            lambda: self._lorax_call(given, [request.inputs], LoraxEmbedding(), authorization)
        )

    def feature_extraction(
        self, body: bytes, authorization: Authorization | None
    ) -> Call | HttpReply:
        """POST /pipeline/feature-extraction"""
        request = lorax.read(self._extractions, body)
        if isinstance(request, HttpReply):
            return request
        return self._understand(lambda: self._extraction(request, authorization))

    def _understand(self, read: Callable[[], Call]) -> Call | HttpReply:
        try:
            return read()
        except RequestError as error:
            return refusal(lorax.as_told(error), streamed=False)

    def _openai(self, request: EmbeddingRequest, authorization: Authorization | None) -> Call:
        inputs = prompts_of(request.input, "input")
        _check_inputs(inputs, "input")
        self._check_dimensions(request.dimensions)
        shape = OpenAIEmbeddings(
            model=request.model or self._base_model,
            base64=request.encoding_format == "base64",
            inputs=len(inputs),
        )
        prompt = self._prompt(
            openai.wanted_adapter(self._adapters, request, authorization),
            tenant_of(request.api_token, authorization),
            self._pooled(request.pooling, request.normalize),
        )
        special = request.add_special_tokens is not False
        prompt = msgspec.structs.replace(prompt, add_special_tokens=special)
        return self._call(prompt, inputs, shape, request.timeout)

    def _extraction(
        self, request: FeatureExtractionRequest, authorization: Authorization | None
    ) -> Call:
        for name, neutral in NOT_IMPLEMENTED.items():
            if not is_neutral(getattr(request, name), neutral):
                raise ParameterError(name, f"`{name}` is not supported")
        self._check_dimensions(request.dimensions)
        given = request.inputs
        inputs = [given] if isinstance(given, str) else given
        return self._lorax_call(request, inputs, FeatureExtraction(len(inputs)), authorization)

    def _lorax_call(
        self,
        given: EmbedParameters,
        inputs: list[str],
        shape: WholeShape,
        authorization: Authorization | None,
    ) -> Call:
        lorax.check_adapters(given)
        _check_inputs(inputs, "inputs")
        prompt = self._prompt(
            lorax.wanted_adapter(self._adapters, given, authorization),
            tenant_of(given.api_token, authorization),
            self._pooled(given.pooling, given.normalize),
        )
        return self._call(prompt, inputs, shape, given.timeout)

    def _check_dimensions(self, dimensions: int | None) -> None:
        if dimensions is not None and dimensions != self._hidden_size():
            raise ParameterError(
                "dimensions",
                f"`dimensions` must be {self._hidden_size()}, as many as the model's hidden states "
                "have: it was not trained so that fewer of them mean the same",
            )

    def _pooled(self, kind: PoolingKind | None, normalize: bool | None) -> Pooling:
        return Pooling(kind or self._pooling, normalize is not False)

    def _prompt(self, wanted: Wanted | None, tenant: str, pooling: Pooling) -> Prompt:
        """All of it but what is embedded."""
        return Prompt(
            request_id=0,
            arrived=0.0,
            adapter=wanted.key if wanted else None,
            adapter_token=wanted.token if wanted else None,
            max_tokens=1,
            tenant=tenant,
            pooling=pooling,
        )

    def _call(
        self,
        prompt: Prompt,
        inputs: list[str] | list[str | bytes],
        shape: WholeShape,
        timeout: float | None,
    ) -> Call:
        prompt, *others = [
            msgspec.structs.replace(
                prompt,
                text=one if isinstance(one, str) else None,
                token_ids=None if isinstance(one, str) else one,
            )
            for one in inputs
        ]
        return Call(
            prompt,
            shape,
            streamed=False,
            others=tuple(others),
            at_once=self._at_once,
            timeout=timeout,
        )


def no_classification(body: bytes, authorization: Authorization | None) -> HttpReply:
    """POST /classify and /classify_batch, in LoRAX's words."""
    sentence = "Server error: Model does not support classification: it has no classification head"
    error = RequestError(424, FailureKind.ADAPTER_UNAVAILABLE, sentence)
    return refusal(error, streamed=False)


def _check_inputs(inputs: list[str] | list[str | bytes], parameter: str) -> None:
    if not all(inputs) or not inputs:
        raise ParameterError(parameter, f"`{parameter}` cannot be empty")
    if len(inputs) > MAX_INPUTS:
        raise ParameterError(
            parameter,
            f"`{parameter}` has {MAX_INPUTS} inputs at most. Given: {len(inputs)}",
        )
