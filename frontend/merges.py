"""`merged_adapters`: what may be merged, how, and the one adapter that comes of it."""

import math
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from frontend.adapters import Wanted
from frontend.parameters import ParameterError
from pipeline.messages import (
    MERGED,
    AdapterKey,
    MajoritySign,
    Merge,
    MergePart,
    MergeStrategy,
)

W = TypeVar("W", MergeStrategy, MajoritySign)

MAX_PARTS = 64


class MergedAdapters(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """As LoRAX's, with `cat` and a seed besides. null is the same as leaving a field out."""

    ids: list[str]
    weights: list[float] | None = None  # 1 each
    merge_strategy: str | None = None  # linear; in capitals too
    density: float | None = None  # of the strategies that prune, which need it
    majority_sign_method: str | None = None  # total
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None  # of dare_*; 0


def check_weights(given: MergedAdapters) -> None:
    """What can be said of it before anything else is looked at. Raises ParameterError."""
    _weights(given)


def merged(given: MergedAdapters, find: Callable[[str], Wanted | None]) -> Wanted:
    """The adapter that is asked for. Raises ParameterError.

    find  what one of the ids means; None is the base model
    """
    strategy = _word(MergeStrategy, given.merge_strategy or "linear", "merge_strategy")
    sign = _word(MajoritySign, given.majority_sign_method or "total", "majority_sign_method")
    weights = _weights(given)
    parts = [_part(find(name)) for name in given.ids]
    sources = sorted({part.key.source for part in parts})
    if len(sources) > 1:
        raise _error("ids", f"are adapters of several sources: {', '.join(sources)}")
    merge = Merge(
        parts=tuple(
            MergePart(part.key, weight) for part, weight in zip(parts, weights, strict=True)
        ),
        strategy=strategy,
        density=_density(given.density, strategy),
        majority_sign=sign if strategy.elects_signs else MajoritySign.TOTAL,
        seed=(given.seed or 0) if strategy.drops_at_random else 0,
    )
    scope = parts[0].key.scope  # one token is shown to the one source
    return Wanted(AdapterKey(MERGED, _describe(merge), scope=scope, merge=merge), parts[0].token)


def _weights(given: MergedAdapters) -> list[float]:
    if not given.ids:
        raise ParameterError(
            "merged_adapters",
            "at least one adapter ID must be provided when setting `adapters`",
            status=422,
        )
    if len(given.ids) > MAX_PARTS:
        raise _error("ids", f"can have at most {MAX_PARTS} adapters. Given: {len(given.ids)}")
    weights = [1.0] * len(given.ids) if given.weights is None else given.weights
    if len(weights) != len(given.ids):
        raise ParameterError(
            "merged_adapters",
            "number of adapter IDs must match number of adapter weights",
            status=422,
        )
    if not all(map(math.isfinite, weights)):
        raise _error("weights", "must be finite")
    return weights


def _part(wanted: Wanted | None) -> Wanted:
    if wanted is None:
        raise _error("ids", "cannot name the base model")
    return wanted


def _density(density: float | None, strategy: MergeStrategy) -> float:
    """1 where it has no effect. lorax-client has to send one there, and may send 0."""
    if not strategy.prunes:
        if density is not None and not 0 <= density <= 1:
            raise _error("density", "must be > 0.0 and <= 1.0")
        return 1.0
    if density is None:
        raise _error("density", f"must be given for {strategy}")
    if not 0 < density <= 1:
        raise _error("density", "must be > 0.0 and <= 1.0")
    return density


def _word(words: type[W], given: str, field: str) -> W:
    try:
        return words(given.lower())
    except ValueError as error:
        raise _error(field, f"must be one of {', '.join(words)}") from error


def _describe(merge: Merge) -> str:
    """For people: the value itself tells merges apart."""
    parts = [f"{part.adapter.id}*{part.weight:g}" for part in merge.parts]
    if merge.density != 1:
        parts.append(f"density={merge.density:g}")
    return f"{merge.strategy}({', '.join(parts)})"


def _error(field: str, sentence: str) -> ParameterError:
    return ParameterError(
        f"merged_adapters.{field}", f"`merged_adapters.{field}` {sentence}", status=422
    )
