"""Why the scheduler ends a request before its time, in the client's words."""

from pipeline.messages import GRAMMAR_GAVE_UP, AdapterKey, Failure, FailureKind


def too_many_blocks(needed: int, total: int) -> Failure:
    return Failure(
        422,
        FailureKind.VALIDATION,
        f"prompt and max_tokens together need {needed} KV blocks, the server has {total}",
    )


def waited_too_long(seconds: float) -> Failure:
    return Failure(
        503, FailureKind.TIMEOUT, f"the request could not be started within {seconds:g} seconds"
    )


def tenant_waits(limit: int) -> Failure:
    return Failure(
        429, FailureKind.OVERLOADED, f"{limit} requests of yours wait already, as many as may"
    )


def load_too_slow(adapter: AdapterKey, seconds: float) -> Failure:
    return Failure(
        503,
        FailureKind.ADAPTER_UNAVAILABLE,
        f"adapter {adapter.id} could not be loaded within {seconds:g} seconds",
    )


def adapter_too_large(
    adapter: AdapterKey, nbytes: int, pool_bytes: int, pinned_bytes: int
) -> Failure:
    pinned = f", of which {pinned_bytes} are pinned" if pinned_bytes else ""
    return Failure(
        422,
        FailureKind.ADAPTER_INVALID,
        f"adapter {adapter.id} takes {nbytes} bytes, the adapter pool has {pool_bytes}{pinned}",
    )


def adapter_changed(adapter: AdapterKey) -> Failure:
    return Failure(
        503,
        FailureKind.ADAPTER_UNAVAILABLE,
        f"adapter {adapter.id} was replaced by another version while the request was running",
    )


def no_token(instead: int, adapter: AdapterKey | None) -> Failure:
    """What a step gave instead of a token."""
    if instead == GRAMMAR_GAVE_UP:
        return Failure(
            422,
            FailureKind.GRAMMAR,
            "the grammar is too complex: what may follow was not found within its limits",
        )
    return not_finite("logits", adapter)


def not_finite(what: str, adapter: AdapterKey | None) -> Failure:
    """The model has given such numbers."""
    if adapter is None:
        return Failure(500, FailureKind.INTERNAL, f"the model gave {what} that are not finite")
    return Failure(
        422,
        FailureKind.ADAPTER_INVALID,
        f"the model with adapter {adapter.id} gave {what} that are not finite",
    )


def reply_is_lost() -> Failure:
    """A reply that had begun is asked for again by somebody, and not known here."""
    return Failure(
        500, FailureKind.INTERNAL, "the server lost the reply before it was complete; please retry"
    )


def no_grammar(error: str) -> Failure:
    return Failure(422, FailureKind.GRAMMAR, error)


def name_is_taken(name: str) -> Failure:
    return Failure(400, FailureKind.NAME_TAKEN, f"an adapter is loaded as '{name}' already")


def no_such_name(name: str) -> Failure:
    return Failure(404, FailureKind.NAME_UNKNOWN, f"no adapter is loaded as '{name}'")


def not_pinned(adapter: AdapterKey) -> Failure:
    return Failure(404, FailureKind.ADAPTER_NOT_FOUND, f"adapter {adapter.id} is not pinned")


def too_much_pinned(adapter: AdapterKey, pinned: int, pinned_bytes: int, share: float) -> Failure:
    return Failure(
        400,
        FailureKind.VALIDATION,
        f"adapter {adapter.id} cannot be pinned: {pinned} adapters with {pinned_bytes} bytes are, "
        f"and pinned_pool_fraction allows {share:g} of the adapter pool",
    )
