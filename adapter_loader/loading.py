"""What the worker threads do: fetch, check and pack one adapter, and turn errors into failures."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec
from prometheus_client import Histogram

from adapter_loader.checkpoint import BaseModel, Plan, pack, plan
from adapter_loader.peft_config import parse_peft_config
from adapter_loader.refusals import failure, unavailable
from adapter_loader.sources import WEIGHTS_FILE, AdapterFiles, Identity, Source
from pipeline.errors import RequestError
from pipeline.messages import AdapterKey, Failure, FailureKind
from pipeline.metrics import REGISTRY

T = TypeVar("T")
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
    files: AdapterFiles
    plan: Plan

    def close(self) -> None:
        self.files.close()


def fetch_and_check(
    key: AdapterKey, token: str | None, known: Identity | None, source: Source, base: BaseModel
) -> Checked | Unchanged:
    """Raises RequestError."""
    with _timed(key, "fetch"):
        files = source.fetch(key, token)
    if files.identity == known:
        files.close()
        return Unchanged()
    try:
        with _timed(key, "check"):
            config = parse_peft_config(files.config)
            return Checked(key, files, plan(files.weights, files.weights_bytes, config, base))
    except BaseException:
        files.close()
        raise


def pack_checked(checked: Checked, extent: memoryview) -> str:
    """Fill the extent and close the files; returns the content's digest. Raises RequestError."""
    try:
        with _timed(checked.key, "pack"):
            content = pack(checked.files.weights, checked.plan, extent)
        if checked.files.has_changed():
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


@contextmanager
def _timed(key: AdapterKey, stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        STAGE_SECONDS.labels(key.source, stage).observe(time.monotonic() - started)
