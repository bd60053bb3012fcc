"""Compile many Triton kernels at once, where they would be compiled one by one as they are used.

A rehearsal goes through everything that is to be launched; it launches nothing, and notes what
would have to be compiled. Then threads compile it: most of the work is outside of Python.
"""

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton import knobs

log = logging.getLogger(__name__)


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Kernels that are used within are there at its end. Those that were not there before are not
    launched, so what is computed within is void, and must not be used as an index.
    """
    noted: dict[tuple[str, str], tuple[Any, str]] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        noted[fn.module + fn.name, key] = (fn.jit_function, compile["specialization_data"])
        return True  # neither compile nor launch

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before
    start = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        compiled = [threads.submit(kernel.preload, data) for kernel, data in noted.values()]
    for one in compiled:
        one.result()
    seconds = time.perf_counter() - start
    log.info("event=kernels_compiled kernels=%d seconds=%.1f", len(compiled), seconds)
