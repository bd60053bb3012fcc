"""What the worker threads do: fetch, check and pack one adapter, and turn errors into failures."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import msgspec
from prometheus_client import Histogram

from adapter_loader.checkpoint import BaseModel, Modules, check
from adapter_loader.merged_checkpoint import MergePlan, pack_merge, plan_merge
from adapter_loader.ordinary_files import Identity
from adapter_loader.packing import Plan, pack, plan
from adapter_loader.peft_config import parse_peft_config
from adapter_loader.refusals import failure, invalid, unavailable
from adapter_loader.sources import WEIGHTS_FILE, AdapterFiles, Source
from adapter_loader.texts import Texts
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, Failure, FailureKind
from pipeline.metrics import REGISTRY

T = TypeVar("T")
AnyPlan = Plan | MergePlan
log = logging.getLogger(__name__)

STAGE_SECONDS = Histogram(
    "loradex_adapter_load_stage_seconds",
    "Time that one stage of a load took",
    ["source", "stage"],
    registry=REGISTRY,
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)


class Unchanged(msgspec.Struct, frozen=True):
    """The source still has what is staged."""


class Checked(msgspec.Struct, frozen=True):
    """An adapter that fits: its open files and how they will be packed. Close it once."""

    key: AdapterKey
    files: tuple[AdapterFiles, ...]  # one, or those of the parts of a merge
    plan: AnyPlan

    @property
    def identity(self) -> Identity:
        return _identity(self.files)

    def close(self) -> None:
        for files in self.files:
            files.close()


def fetch_and_check(
    key: AdapterKey, token: str | None, known: Identity | None, source: Source, base: BaseModel
) -> Checked | Unchanged:
    """Find the adapter, or all parts of the merge, which are of one source. Raises RequestError."""
    with ExitStack() as opened:
        files: list[AdapterFiles] = []
        with _timed(key, "fetch"):
            for part in key.parts:
                with _naming(part, key):
                    files.append(source.fetch(part, token))
                opened.callback(files[-1].close)
        if _identity(files) == known:
            return Unchanged()
        with _timed(key, "check"):
            modules: list[Modules] = []
            for part, of_part in zip(key.parts, files, strict=True):
                with _naming(part, key):
                    modules.append(_check(of_part, base))
            merge = key.merge
            planned: AnyPlan
            if merge is None:
                planned = plan(modules[0], base)
            else:
                planned = plan_merge(tuple(modules), merge, base)
        opened.pop_all()
        return Checked(key, tuple(files), planned)


def fill(plan: AnyPlan, weights: Sequence[int], extent: memoryview) -> str:
    """Pack what the open files hold; returns the content's digest. Raises RequestError."""
    if isinstance(plan, Plan):
        return pack(weights[0], plan, extent)
    return pack_merge(weights, plan, extent)


def pack_checked(checked: Checked, pack_into: Callable[[AnyPlan, Sequence[int]], str]) -> str:
    """Have it packed, and close the files; returns the content's digest. Raises RequestError.

    pack_into  does what `fill` does, for some extent
    """
    try:
        weights = [files.weights for files in checked.files]
        with _timed(checked.key, "pack"):
            content = pack_into(checked.plan, weights)
        if any(files.has_changed() for files in checked.files):
            raise unavailable(f"{WEIGHTS_FILE} changed while it was read")
        return content
    finally:
        checked.close()


def guarded(key: AdapterKey, job: Callable[[], T]) -> T | Failure:
    """The job's result, or why there is none. An adapter that breaks us fails alone."""
    try:
        return job()
    except RequestError as error:
        return failure(key, error)
    except Exception:
        log.exception("event=adapter_load_broken adapter=%a", key.id)
        return Failure(500, FailureKind.INTERNAL, f"adapter {key.id}: loading it failed")


def texts_or_failure(
    key: AdapterKey, token: str | None, known: str, source: Source | None
) -> Texts | Failure | None:
    """What lies beside the weights for tokenizers, see Source, or why that cannot be had; unlike
    that of a load, the reason does not begin with the adapter's id."""
    if source is None:
        error = invalid(f"the source {key.source} is off")
        return Failure(error.status, FailureKind(error.kind), error.message)
    try:
        with _timed(key, "texts"):
            return source.texts(key, token, known)
    except RequestError as error:
        return Failure(error.status, FailureKind(error.kind), error.message)
    except Exception:
        log.exception("event=adapter_texts_broken adapter=%a", key.id)
        return Failure(500, FailureKind.INTERNAL, "reading its tokenizer files failed")


def _check(files: AdapterFiles, base: BaseModel) -> Modules:
    config = parse_peft_config(files.config)
    return check(files.weights, files.weights_bytes, config, base)


def _identity(files: Iterable[AdapterFiles]) -> Identity:
    return tuple(number for one in files for number in one.identity)


@contextmanager
def _naming(part: AdapterKey, key: AdapterKey) -> Iterator[None]:
    """Say which part of a merge an error is about."""
    try:
        yield
    except RequestError as error:
        if key.merge is None:
            raise
        raise RequestError(error.status, error.kind, f"part {part.id}: {error.message}") from error


@contextmanager
def _timed(key: AdapterKey, stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        STAGE_SECONDS.labels(key.source, stage).observe(time.monotonic() - started)
