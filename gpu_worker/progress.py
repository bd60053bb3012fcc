"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

LINE_SECONDS = 2.0  # between two plain lines
log = logging.getLogger(__name__)


def progress(
    layers: Iterable[int], *, total: int, line_seconds: float = LINE_SECONDS
) -> Iterator[int]:
    """Go through the layers of a model, and show how far it has come."""
    if sys.stderr.isatty():
        yield from tqdm(layers, total=total, desc="loading weights", unit="layer", leave=False)
        return
    shown = time.monotonic()
    for done, layer in enumerate(layers):
        if time.monotonic() - shown >= line_seconds:
            shown = time.monotonic()
            log.info("event=loading_weights layers=%d/%d", done, total)
        yield layer
