"""Every message between processes, one union per inbox.

Messages are frozen and flat; the first line of each says which edge it travels. Arrays are bytes
of little-endian int32 unless a comment says otherwise. A new field goes last, with a default.
"""

from enum import StrEnum
from typing import Any

import msgspec

MERGED = "merged"  # the source of adapters that are merged from others
SECRET = frozenset({"adapter_token"})  # fields of messages
NOT_FINITE, GRAMMAR_GAVE_UP = -1, -2  # in place of a token: logits, or a matcher's limits
REQUEST_BITS = 48  # a request id is its frontend's index, above a counter of this many bits
MAX_TOP_LOGPROBS = 20


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The base of all messages. Their text, as in a traceback, does not show what is in SECRET."""

    def __repr__(self) -> str:
        fields = (
            f"{name}={'***' if name in SECRET and value else repr(value)}"
            for name, value in msgspec.structs.asdict(self).items()
        )
        return f"{type(self).__name__}({', '.join(fields)})"


class Value(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The base of what messages are made of."""


class FinishReason(StrEnum):
    """Why a request ended. Each accepted request ends with exactly one of these."""

    LENGTH = "length"
    EOS = "eos"
    STOP = "stop"
    ERROR = "error"  # `failure` says which
    EMBEDDED = "embedded"  # no reply was wanted


class FailureKind(StrEnum):
    """What sort of failure a client is told of; the HTTP routes map these to their own words."""

    VALIDATION = "validation"
    TEMPLATE = "template"
    GRAMMAR = "grammar"
    ADAPTER_NOT_FOUND = "adapter_not_found"
    ADAPTER_FORBIDDEN = "adapter_forbidden"
    ADAPTER_INVALID = "adapter_invalid"
    ADAPTER_UNAVAILABLE = "adapter_unavailable"
    OVERLOADED = "overloaded"
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"
    INTERNAL = "internal"
    DEADLINE = "deadline"  # the client's own
    NAME_TAKEN = "name_taken"  # these two are told to administrators only
    NAME_UNKNOWN = "name_unknown"


class Failure(Value, frozen=True):
    """A RequestError on its way to the client."""

    status: int
    kind: FailureKind
    message: str


class MergeStrategy(StrEnum):
    """How adapters are merged, see `adapter_loader.merging`."""

    LINEAR = "linear"
    CAT = "cat"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"

    @property
    def drops_at_random(self) -> bool:
        """Of each part, all but `density`, by `seed`."""
        return self in (MergeStrategy.DARE_LINEAR, MergeStrategy.DARE_TIES)

    @property
    def prunes(self) -> bool:
        """At random or not, all but `density` of each part."""
        return self.drops_at_random or self is MergeStrategy.TIES

    @property
    def elects_signs(self) -> bool:
        """By `majority_sign`."""
        return self in (MergeStrategy.TIES, MergeStrategy.DARE_TIES)

    @property
    def needs_one_rank(self) -> bool:
        """In each module, of all parts."""
        return self is not MergeStrategy.CAT


class MajoritySign(StrEnum):
    """What elects a sign: the sum of the values, or the number of them."""

    TOTAL = "total"
    FREQUENCY = "frequency"


class AdapterKey(Value, frozen=True, order=True):
    """Which adapter, before its bytes are known.

    scope is a digest of the token that may be needed to read it, empty for what needs none: two
    tenants' views of a private adapter are two adapters.
    """

    source: str  # of pipeline.config.SOURCES, or MERGED
    id: str  # of a merge: a description of it
    revision: str = ""
    scope: str = ""
    merge: "Merge | None" = None  # with source MERGED only

    @property
    def public(self) -> "AdapterKey":
        """The adapter without its tenant: all tenants' views of it have this in common."""
        return msgspec.structs.replace(self, scope="")

    @property
    def parts(self) -> tuple["AdapterKey", ...]:
        """What is fetched for it: the adapters that are merged, or itself."""
        return (self,) if self.merge is None else tuple(part.adapter for part in self.merge.parts)


class MergePart(Value, frozen=True, order=True):
    """One of the adapters that are merged; not a merge itself."""

    adapter: AdapterKey
    weight: float  # finite


class Merge(Value, frozen=True, order=True):
    """How adapters become one. Equal merges are equal values.

    What a strategy does not use has its default here, so that it tells no two merges apart.
    """

    parts: tuple[MergePart, ...]  # at least one, all of one source
    strategy: MergeStrategy
    density: float = 1.0  # share of the values that is kept, in (0, 1]
    majority_sign: MajoritySign = MajoritySign.TOTAL
    seed: int = 0  # of the values that are dropped at random


class Sampling(Value, frozen=True):
    """How the next token is chosen; the defaults switch each step off."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over output, as OpenAI counts
    presence_penalty: float = 0.0
    seed: int = 0  # uint64
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    min_tokens: int = 0  # produced before a token that ends it may be
    watermark: bool = False  # as gpu_worker.watermark does


class Logprobs(Value, frozen=True):
    """Which log-probabilities a request wants: of its produced tokens, and those of its prompt.

    They are the log softmax of the model's own logits: before bias, penalties, temperature and
    filters. `top` tokens that are the likeliest at each place come beside them.
    """

    top: int = 0  # at most MAX_TOP_LOGPROBS
    prompt_top: int | None = None  # the same for the prompt's tokens; None: nothing of these


class PoolingKind(StrEnum):
    """Which hidden states of a prompt make its embedding. They are those after the final norm."""

    LAST = "last"  # its last token's
    MEAN = "mean"  # the mean of all


class Pooling(Value, frozen=True):
    """That a request wants its prompt's embedding instead of a reply, and how it is made."""

    kind: PoolingKind = PoolingKind.LAST
    normalize: bool = True  # to unit length


class GrammarKind(StrEnum):
    """What a grammar's text is written in."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # of the whole reply
    CHOICE = "choice"  # a JSON list of the texts that may be said
    LARK = "grammar"  # Lark, or GBNF


class Grammar(Value, frozen=True):
    """What a reply has to match, as the client said it."""

    kind: GrammarKind
    text: str


class ToolChoice(StrEnum):
    """Whether a reply calls tools."""

    NONE = "none"  # they are shown to the model; what it says is text
    AUTO = "auto"  # the model decides
    REQUIRED = "required"  # at least one call, and nothing but calls


class Tools(Value, frozen=True):
    """The tools that a chat may call.

    functions  OpenAI's: name, and perhaps description, parameters (a JSON schema) and strict
    only       the one that has to be called, if the client named one; choice is REQUIRED then
    prompt     what to tell a model whose template knows no tools; empty: a text of our own
    """

    functions: list[dict[str, Any]]
    choice: ToolChoice = ToolChoice.AUTO
    only: str = ""
    parallel: bool = True  # several calls in one reply
    prompt: str = ""


class ToolCallPart(Value, frozen=True):
    """What a reply has said of a tool call since the last part. The name comes first, alone."""

    index: int  # of the call in its reply
    name: str = ""
    arguments: str = ""  # a run of the arguments' JSON


class Alternative(Value, frozen=True):
    """A token that might have stood where another does. Its text is its own, see TokenDetail."""

    id: int
    text: str
    logprob: float
    data: bytes | None = None
    special: bool = False


class TokenDetail(Value, frozen=True):
    """One token, for clients that ask for tokens.

    text is what the token adds to that of those before it, in whole characters; data, its own
    bytes, where these are not those of the text.
    """

    id: int
    text: str
    logprob: float | None  # None also of a prompt's first token
    special: bool
    alternatives: tuple[Alternative, ...] = ()  # likeliest first, the token itself among them
    data: bytes | None = None


class Usage(Value, frozen=True):
    """What a request took. Times are seconds."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    queue_seconds: float = 0.0  # from submit to its first step
    first_token_seconds: float = 0.0  # from submit to its first token
    total_seconds: float = 0.0  # from submit to its end


# --- frontend -> tokenizer_workers ---------------------------------------------------------------


class ChatOptions(Value, frozen=True):
    """How a chat becomes a prompt. The defaults are the model's own way."""

    template: str = ""  # the request's own; nobody vouches for it
    documents: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}  # of the client's, for the template
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the prompt ends with that message, which goes on
    add_special_tokens: bool = False  # those that the tokenizer puts around a text


# Of each choice of a prompt that is sent again: how many tokens of its reply the frontend has, as
# Piece.produced counts; GONE if nobody waits for more of it.
Heard = tuple[int, ...]
GONE = -1


class Prompt(Message, frozen=True):
    """frontend -> tokenizer_workers: encode this and submit it.

    Exactly one of text, chat and token_ids is given.
    """

    request_id: int
    arrived: float  # time.monotonic(), which all processes of a node share
    text: str | None = None
    chat: list[dict[str, Any]] | None = None  # messages, for the chat template
    token_ids: bytes | None = None
    adapter: AdapterKey | None = None  # None is the base model
    adapter_token: str | None = None  # secret: what the adapter's source wants to see
    sampling: Sampling = Sampling()
    max_tokens: int | None = None  # None: as many as fit
    stop: tuple[str, ...] = ()
    keep_stop: bool = False  # leave the stop string in the text, as LoRAX does
    ignore_eos: bool = False
    token_details: bool = False  # send a TokenDetail per token
    add_special_tokens: bool = True
    tenant: str = ""  # a digest of who asks; empty for those who do not say
    logprobs: Logprobs | None = None  # they come in the details of tokens
    prompt_details: bool = False  # send the prompt's text back, and its tokens if logprobs has them
    choices: int = 1  # replies; see pipeline.choices
    stop_token_ids: tuple[int, ...] = ()  # each is an end as EOS is, whatever ignore_eos says
    trace: str = ""  # see Span.trace; empty where nothing is traced
    chat_options: ChatOptions = ChatOptions()  # of a chat
    grammar: Grammar | None = None
    tools: Tools | None = None  # of a chat
    truncate: int | None = None  # keep so many tokens of the prompt, its last
    pooling: Pooling | None = None  # the embedding is wanted, and no reply; max_tokens is 1
    heard: Heard | None = None  # None: it is not sent again


class Rendered(Message, frozen=True):
    """tokenizer_workers -> itself, from the thread that waits for templates nobody vouches for."""

    request_id: int
    text: str
    failure: Failure | None = None


class Tokenize(Message, frozen=True):
    """frontend -> tokenizer_workers: which tokens is this text? Answered by one Tokenized."""

    question_id: int
    frontend: int
    text: str
    add_special_tokens: bool = True


class Cancel(Message, frozen=True):
    """frontend -> tokenizer_workers -> scheduler: nobody waits for this request any more.

    tokenizer_workers sends it also when a stop string has matched. No end is reported back.
    """

    request_id: int
    stopped: bool = False  # its worker has ended it, and the frontend may not have heard it yet


class StillOpen(Message, frozen=True):
    """frontend -> tokenizer_workers -> scheduler: to a worker that was started again.

    Nobody waits for any other request that this frontend had given to its predecessors. These
    here follow once more.
    """

    frontend: int
    worker: int
    request_ids: list[int]


class GrammarChecked(Message, frozen=True):
    """tokenizer_workers -> itself, from the thread that compiles: may this grammar be used?"""

    source: str
    error: str = ""  # a sentence for the client; empty if it may


class TokenizerCompared(Message, frozen=True):
    """tokenizer_workers -> itself, from the thread that compares: is it the base model's?"""

    tokenizer: str  # sha256 of an adapter's tokenizer.json
    difference: str = ""  # the end of a sentence; empty if they agree


class Shutdown(Message, frozen=True):
    """Downstream, from each process to those it feeds: no request will follow from me."""

    process: str
    index: int = 0


# --- frontend, tokenizer_workers -> scheduler ----------------------------------------------------


class Prefetch(Message, frozen=True):
    """frontend -> scheduler: a request for this adapter is on its way."""

    adapter: AdapterKey
    adapter_token: str | None = None
    tenant: str = ""  # as of the prompt
    trace: str = ""  # as of the prompt


class Submit(Message, frozen=True):
    """tokenizer_workers -> scheduler: run this prompt."""

    request_id: int
    worker: int  # index of the tokenizer worker that wants the tokens
    arrived: float
    token_ids: bytes  # at least one
    max_tokens: int  # at least one; prompt and max_tokens together fit the context
    adapter: AdapterKey | None = None
    adapter_token: str | None = None
    sampling: Sampling = Sampling()
    ignore_eos: bool = False
    logprobs: Logprobs | None = None
    tenant: str = ""  # as of the prompt
    choices: int = 1  # requests: this one and those whose ids follow; see pipeline.choices
    stop_token_ids: tuple[int, ...] = ()  # besides EOS
    trace: str = ""  # as of the prompt
    grammar: str = ""  # as the library writes it; it was compiled once and is known to be good
    pooling: Pooling | None = None  # as of the prompt
    heard: Heard | None = None  # as of the prompt


class EndsHeard(Message, frozen=True):
    """frontend -> scheduler: these ends have come; the requests need not be known any more."""

    request_ids: list[int]


# --- frontend <-> scheduler: administration -------------------------------------------------------


class AdminVerb(StrEnum):
    """What an administrator wants of an adapter."""

    LOAD = "load"  # bring it into the pool, then give it this name
    UNLOAD = "unload"  # take the name away, then the adapter out of pool and arena
    PIN = "pin"  # bring it into the pool, and let it not be evicted
    UNPIN = "unpin"


class AdminCommand(Message, frozen=True):
    """frontend -> scheduler: do this. Answered by one AdminDone when it is done, or cannot be."""

    command_id: int
    frontend: int
    verb: AdminVerb
    name: str = ""  # of load and unload
    adapter: AdapterKey | None = None  # of all but unload
    adapter_token: str | None = None
    pinned: bool = False  # of load: pin it too
    in_place: bool = False  # of load: the name may be taken; the adapter is read anew


class AdminDone(Message, frozen=True):
    """scheduler -> frontend: the command is done, or why not."""

    command_id: int
    failure: Failure | None = None


class Aliases(Message, frozen=True):
    """scheduler -> frontend: all names that administrators have given, and what they mean.

    Answered by one AliasesTaken.
    """

    version: int
    names: dict[str, AdapterKey]


class NamesKept(Message, frozen=True):
    """frontend -> scheduler, which was started again: the names that its predecessor told last."""

    version: int
    names: dict[str, AdapterKey]
    frontend: int


class AliasesTaken(Message, frozen=True):
    """frontend -> scheduler: the names hold here.

    And no request is left that began while a name meant something else than it does now and that
    uses that.
    """

    version: int
    frontend: int


class ListAdapters(Message, frozen=True):
    """frontend -> scheduler: which adapters are there? Answered by one AdapterList."""

    command_id: int
    frontend: int


class Tier(StrEnum):
    """The best place that an adapter lies in."""

    DEVICE = "device"  # the GPU worker's pool
    HOST = "host"  # the arena
    DISK = "disk"  # the disk cache, or its source alone


class AdapterDescription(Value, frozen=True):
    """An adapter that was loaded at least once."""

    adapter: AdapterKey
    tier: Tier
    nbytes: int  # packed
    rank: int  # the largest of its modules
    pinned: bool  # by an administrator
    pins: int  # what keeps it in the pool: sequences that run, copies and moves
    running: int  # requests
    waiting: int  # requests
    loads: int  # from its source or the disk cache, or checked there and found unchanged
    idle_seconds: float  # since a request for it came, or it was loaded


class AdapterList(Message, frozen=True):
    """scheduler -> frontend: all adapters that are known, by key."""

    command_id: int
    adapters: tuple[AdapterDescription, ...]


# --- scheduler -> gpu_worker ---------------------------------------------------------------------


class AttachArena(Message, frozen=True):
    """scheduler -> gpu_worker: where adapters are staged. Comes before the first copy."""

    path: str
    nbytes: int


class AdapterCopy(Value, frozen=True):
    """Copy a staged adapter from the arena to the pool.

    The slot is the adapter's number in the worker's table; a slot that is given again is
    overwritten.
    """

    slot: int
    pool_offset: int  # bytes
    arena_offset: int  # bytes
    nbytes: int
    ranks: bytes  # int16[layers, modules], see adapter_layout


class AdapterMove(Value, frozen=True):
    """Move a resident adapter down in the pool; the two ranges may overlap. Its slot stays."""

    slot: int
    from_offset: int  # bytes
    to_offset: int  # bytes
    nbytes: int
    in_use: bool  # steps sent earlier may still read it: it is moved after them


class PlaceAdapter(Message, frozen=True):
    """scheduler -> gpu_worker: bring an adapter into the pool, beside the steps.

    The moves, in order, make room for the copy. Steps that are sent later find all of these in
    their new places, and wait only if they use one before it has arrived. No step sent earlier
    that is not done uses the copy's slot, or bytes that are overwritten, unless a move is in use.
    Each is answered by one AdapterPlaced, in order; until then its arena extent is leased.
    """

    copy: AdapterCopy
    moves: tuple[AdapterMove, ...] = ()


class CompileGrammar(Message, frozen=True):
    """scheduler -> gpu_worker: rows will name this grammar. Answered by one GrammarCompiled.

    No row uses those in `forget`, or will.
    """

    grammar_id: int  # at least 1
    source: str
    forget: tuple[int, ...] = ()


class NewRow(Value, frozen=True):
    """A sequence takes a row of the worker's table; the row was free or is freed in this step.

    token_ids holds the prompt and, after a preemption, what was produced before it. The KV of the
    first cached_tokens of them is in `blocks` already.
    """

    row: int
    slot: int  # of its adapter; -1 is the base model
    token_ids: bytes
    prompt_tokens: int
    cached_tokens: int
    blocks: bytes
    sampling: Sampling
    logprobs: Logprobs | None
    end_token_ids: tuple[int, ...] = ()  # not to be sampled before sampling.min_tokens
    trace: str = ""  # as of the prompt
    grammar_id: int = 0  # of a grammar that is compiled; 0: any token may follow
    pooling: Pooling | None = None  # it is embedded: nothing is sampled after its prompt


class Step(Message, frozen=True):
    """scheduler -> gpu_worker: change the row table, then run one forward pass.

    Applied in this order: free_rows, new_rows, appended blocks, forward pass.

    A decode row feeds the token that was sampled for it last, which the worker keeps, at the next
    position. A prefill chunk feeds token_ids[start : start + count] of its row. A token is sampled
    for each decode row, in order, then for each chunk that reaches the end of its row's token_ids,
    in order. A row occurs once in a step. A row that is embedded is never decoded, and in place of
    a token its last chunk gives its embedding.

    A row that wants the log-probabilities of its prompt is scored in each chunk: each token but the
    prompt's last gives that of the token after it.
    """

    step_id: int  # counts up
    decode_rows: bytes = b""
    prefill: bytes = b""  # int32[chunks, 3]: row, start, count
    block_rows: bytes = b""  # row block_rows[i] gets blocks[i] as its next block
    blocks: bytes = b""
    free_rows: bytes = b""
    new_rows: tuple[NewRow, ...] = ()


# --- gpu_worker -> scheduler ---------------------------------------------------------------------


class WorkerReady(Message, frozen=True):
    """gpu_worker -> scheduler: weights are loaded, steps may come.

    From each incarnation, once to each of the scheduler. The device holds nothing of anybody.
    """

    kv_blocks: int
    block_tokens: int
    adapter_pool_bytes: int
    adapter_slots: int
    rows: int
    index: int = 0
    step_tokens: int = 512  # that a step may feed


class StepDone(Message, frozen=True):
    """gpu_worker -> scheduler: the tokens of a step, in the order that `Step` defines.

    A token below 0 means that the sequence cannot go on, see NOT_FINITE and GRAMMAR_GAVE_UP.
    """

    step_id: int
    token_ids: bytes
    logprobs: bytes = b""  # rows of pipeline.logprobs: of sampled tokens that want them, in order,
    # then of the scored tokens of each chunk, in order
    index: int = 0
    embeddings: bytes = b""  # float32[hidden] of each row that is embedded and whose last chunk
    # this step had, in order; all NaN if it is not finite


class GrammarCompiled(Message, frozen=True):
    """gpu_worker -> scheduler: rows may name it, or why they cannot."""

    grammar_id: int
    error: str = ""
    index: int = 0


class AdapterPlaced(Message, frozen=True):
    """gpu_worker -> scheduler: the oldest PlaceAdapter is done, the arena is not read for it."""

    slot: int
    index: int = 0


# --- scheduler <-> adapter_loader ----------------------------------------------------------------


class LoadAdapter(Message, frozen=True):
    """scheduler -> adapter_loader: stage this adapter. Answered by one AdapterStaged or -Failed."""

    adapter: AdapterKey
    adapter_token: str | None = None
    trace: str = ""  # of the request that it is asked for


class Lease(Value, frozen=True):
    """An extent of the arena that the scheduler has, of this adapter."""

    adapter: AdapterKey
    arena_offset: int
    nbytes: int


class Leased(Message, frozen=True):
    """scheduler -> adapter_loader: what loaders before you have leased to me, and still is.

    Comes before anything else, if there are such leases. Each ends with one ReleaseAdapter.
    """

    leases: tuple[Lease, ...]


class ReleaseAdapter(Message, frozen=True):
    """scheduler -> adapter_loader: the extent of one AdapterStaged is not read any more."""

    adapter: AdapterKey
    arena_offset: int


class ArenaReady(Message, frozen=True):
    """adapter_loader -> scheduler: the arena exists, loads may come.

    From each incarnation, once to each of the scheduler.
    """

    path: str
    nbytes: int


class AdapterStaged(Message, frozen=True):
    """adapter_loader -> scheduler: the packed adapter lies in the arena, leased to the scheduler.

    The scheduler gives the lease back with one ReleaseAdapter. content is a digest of the packed
    bytes and their ranks: the same key with another content is another adapter.
    """

    adapter: AdapterKey
    content: str
    arena_offset: int
    nbytes: int
    ranks: bytes  # int16[layers, modules]


class AdapterFailed(Message, frozen=True):
    """adapter_loader -> scheduler: this adapter cannot be had; its waiting requests end with it."""

    adapter: AdapterKey
    failure: Failure


class ForgetAdapter(Message, frozen=True):
    """scheduler -> adapter_loader: keep nothing of this adapter. Answered by one AdapterDropped."""

    adapter: AdapterKey


class AdapterDropped(Message, frozen=True):
    """adapter_loader -> scheduler: the arena holds nothing of this adapter any more.

    Also sent when its room was needed for others.
    """

    adapter: AdapterKey


# --- tokenizer_workers <-> adapter_loader ---------------------------------------------------------


class AskTexts(Message, frozen=True):
    """tokenizer_workers -> adapter_loader: what is there for tokenizers beside these weights?

    Answered by one AdapterTexts. It may be asked again with the same number.
    """

    question_id: int
    worker: int
    adapter: AdapterKey  # not a merge
    adapter_token: str | None = None
    known: str = ""  # the version that the worker has
    known_tokenizers: tuple[str, ...] = ()  # sha256 of tokenizer.json that need not be sent


class AdapterTexts(Message, frozen=True):
    """adapter_loader -> tokenizer_workers: the files by name, or why they cannot be had."""

    question_id: int
    adapter: AdapterKey
    version: str = ""  # equal for equal files
    files: dict[str, bytes] | None = None  # None: the version is the one that is known
    tokenizer: str = ""  # sha256 of tokenizer.json, if there is one, sent or not
    failure: Failure | None = None  # its message is without the adapter's id


class ForgetTexts(Message, frozen=True):
    """adapter_loader -> tokenizer_workers: what is known of the adapter's files may be outdated."""

    adapter: AdapterKey


# --- scheduler -> tokenizer_workers --------------------------------------------------------------


class Finished(Value, frozen=True):
    """The end of a request, as the scheduler sees it."""

    request_id: int
    reason: FinishReason
    usage: Usage
    failure: Failure | None = None
    embedding: bytes = b""  # float32[hidden], with reason EMBEDDED


class Tokens(Message, frozen=True):
    """scheduler -> tokenizer_workers: what a step gave this worker's requests.

    request_ids[i] produced token_ids[i]; a request that ends has its last token here and its end
    in `finished`.
    """

    request_ids: list[int]
    token_ids: list[int]
    logprobs: dict[int, bytes]  # of token_ids[i], a row of pipeline.logprobs, where it is wanted
    finished: tuple[Finished, ...] = ()


class PromptLogprobs(Message, frozen=True):
    """scheduler -> tokenizer_workers: of tokens of a prompt. Those before them have been sent.

    The first is of the prompt's second token, and the last comes before what is produced.
    """

    request_id: int
    rows: list[bytes]  # of pipeline.logprobs


class Resumed(Message, frozen=True):
    """scheduler -> tokenizer_workers: all that came of a request that was submitted again.

    Tokens and PromptLogprobs go on from there. A request that the scheduler had not known starts
    without this.
    """

    request_id: int
    token_ids: bytes
    logprobs: list[bytes]  # of each token, if they are wanted: rows of pipeline.logprobs
    prompt_logprobs: list[bytes]
    first_token: float  # when it came, time.monotonic(); 0 if there is none
    finished: Finished | None = None  # if it has ended


# --- tokenizer_workers -> frontend ---------------------------------------------------------------


class Piece(Value, frozen=True):
    """Text that a request has produced since its last piece; whole characters only."""

    request_id: int
    text: str
    tokens: tuple[TokenDetail, ...] = ()
    tool_calls: tuple[ToolCallPart, ...] = ()  # after the text
    produced: int = 0  # tokens, in all: this and the pieces before it are what they have said


class End(Value, frozen=True):
    """The one end of a request. Any last text came in a piece before it, or with it."""

    request_id: int
    reason: FinishReason
    usage: Usage
    failure: Failure | None = None
    embedding: bytes = b""  # float32[hidden], with reason EMBEDDED


class PromptDetails(Message, frozen=True):
    """tokenizer_workers -> frontend: what a prompt is. Comes before its reply.

    Of a request with several choices it is told once, under the first's id.
    """

    request_id: int
    text: str  # without the special tokens that the tokenizer puts around it
    tokens: tuple[TokenDetail, ...] = ()  # if their log-probabilities are wanted


class Tokenized(Message, frozen=True):
    """tokenizer_workers -> frontend: the tokens of a text, or why they cannot be told."""

    question_id: int
    token_ids: bytes = b""
    texts: tuple[str, ...] = ()  # as the vocabulary writes them
    spans: bytes = b""  # int32[tokens, 2]: of the text, in characters
    failure: Failure | None = None


class Pieces(Message, frozen=True):
    """tokenizer_workers -> frontend: one message per step. A request's piece precedes its end."""

    pieces: list[Piece]
    ends: tuple[End, ...] = ()


# --- each -> itself ------------------------------------------------------------------------------


class PeerStarted(Message, frozen=True):
    """The inbox -> its process: what comes from now on is from another incarnation of a peer.

    All that its predecessor was told and has not answered is lost, and so is what it knew.
    """

    process: str
    index: int
    again: bool  # there was one before it that this process has heard of


# --- each -> frontend ----------------------------------------------------------------------------


class ProcessReady(Message, frozen=True):
    """each -> frontend: this process can work. facts are what /info and the ready line show."""

    process: str
    index: int = 0
    facts: dict[str, str | int | float | None] = {}


class ProcessDied(Message, frozen=True):
    """The keep-alive -> frontend: this incarnation is dead, and another will be started."""

    process: str
    index: int
    number: int  # of the incarnation
    cause: str


class Stats(Message, frozen=True):
    """each -> frontend: its metrics as they stand, see `metrics.snapshot`."""

    process: str
    index: int
    families: list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]


class Span(Value, frozen=True):
    """Something that was done for a request that is traced. Times are time.monotonic()."""

    trace: str  # W3C traceparent of the request's span, which this one is a child of
    name: str
    started: float
    ended: float
    attributes: dict[str, str | int | float | bool] = {}  # no text, no secret
    failed: bool = False


class Spans(Message, frozen=True):
    """each -> frontend 0: what it has done for requests that are traced."""

    process: str
    index: int
    spans: tuple[Span, ...]


ToFrontend = (
    Pieces
    | PromptDetails
    | Tokenized
    | ProcessReady
    | ProcessDied
    | Stats
    | Spans
    | Aliases
    | AdminDone
    | AdapterList
    | PeerStarted
)
ToTokenizerWorker = (
    Prompt
    | Tokenize
    | Rendered
    | GrammarChecked
    | Cancel
    | StillOpen
    | Tokens
    | PromptLogprobs
    | Resumed
    | AdapterTexts
    | ForgetTexts
    | TokenizerCompared
    | PeerStarted
    | Shutdown
)
ToScheduler = (
    Prefetch
    | Submit
    | StillOpen
    | EndsHeard
    | Cancel
    | WorkerReady
    | StepDone
    | AdapterPlaced
    | GrammarCompiled
    | ArenaReady
    | AdapterStaged
    | AdapterFailed
    | AdapterDropped
    | AdminCommand
    | AliasesTaken
    | NamesKept
    | ListAdapters
    | PeerStarted
    | Shutdown
)
ToGpuWorker = AttachArena | PlaceAdapter | CompileGrammar | Step | PeerStarted | Shutdown
ToAdapterLoader = (
    LoadAdapter | Leased | ReleaseAdapter | ForgetAdapter | AskTexts | PeerStarted | Shutdown
)
