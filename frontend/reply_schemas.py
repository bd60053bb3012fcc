"""What replies look like, for the document of the API. Replies are written elsewhere, by hand for
speed; tests read them as these.
"""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

LoraxFinishReason = Literal["length", "eos_token", "stop_sequence"]


class OpenAIErrorFacts(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | int | None


class OpenAIError(Struct, frozen=True):
    """What went wrong, on /v1/*."""

    error: OpenAIErrorFacts


class PromptTokens(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class ReplyMessage(Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ChatChoice(Struct, frozen=True):
    index: int
    message: ReplyMessage
    logprobs: Any
    finish_reason: str


class ChatCompletion(Struct, frozen=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: Any
    finish_reason: str


class Completion(Struct, frozen=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class EmbeddingUsage(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embedding(Struct, frozen=True):
    """Of one input; base64 is of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Struct, frozen=True):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Model(Struct, frozen=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class Models(Struct, frozen=True):
    """The base model, and the adapters that are known."""

    object: Literal["list"]
    data: list[Model]


class LoraxError(Struct, frozen=True):
    """What went wrong, on the routes of LoRAX."""

    error: str
    error_type: str


class LoraxToken(Struct, frozen=True):
    id: int
    text: str
    logprob: float | None
    special: bool
    skipped: bool
    alternative_tokens: list["PrefillToken"] | UnsetType = UNSET


class PrefillToken(Struct, frozen=True):
    """A token of the prompt, or one that might stand where another does."""

    id: int
    text: str
    logprob: float | None


class TopToken(Struct, frozen=True):
    id: int
    text: str
    logprob: float
    special: bool


class BestOfSequence(Struct, frozen=True):
    generated_text: str
    finish_reason: LoraxFinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[LoraxToken]
    top_tokens: list[list[TopToken]] | UnsetType = UNSET


class LoraxDetails(Struct, frozen=True):
    finish_reason: LoraxFinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[LoraxToken]
    top_tokens: list[list[TopToken]] | UnsetType = UNSET  # TGI's
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET


class Generated(Struct, frozen=True):
    generated_text: str
    details: LoraxDetails | UnsetType = UNSET  # if they are asked for


class LoraxEmbedding(Struct, frozen=True):
    """Of one text."""

    embeddings: list[float]


class TextToken(Struct, frozen=True):
    """A token, and which characters of the text it is."""

    id: int
    text: str
    start: int
    stop: int


class Done(Struct, frozen=True):
    message: str


class SglangDone(Struct, frozen=True):
    success: bool
    error_message: str
    loaded_adapters: dict[str, str]


class KnownAdapter(Struct, frozen=True):
    """An adapter that was loaded at least once, and where it lies."""

    source: str
    id: str
    revision: str | None
    private: bool
    names: list[str]
    rank: int
    bytes: int
    tier: Literal["device", "host", "disk"]
    pinned: bool
    pins: int
    running: int
    waiting: int
    loads: int
    idle_seconds: float


class KnownAdapters(Struct, frozen=True):
    object: Literal["list"]
    data: list[KnownAdapter]
