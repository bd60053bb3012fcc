"""The thread that has adapters' tokenizers compared, so that nobody's text waits for it."""

import threading
from pathlib import Path
from queue import SimpleQueue

from pipeline.channels import Outbox
from pipeline.config import Settings
from pipeline.messages import TokenizerCompared
from tokenizer_workers.compare import compare
from tokenizer_workers.known_texts import ToCompare


class Comparisons:
    """Compares what it is given with the tokenizer in a folder, one after the other; the answers go
    to this process's own inbox."""

    def __init__(self, settings: Settings, process: str, index: int, folder: Path) -> None:
        self._run_dir = settings.run_folder()
        self._process = process
        self._index = index
        self._folder = folder
        self._given: SimpleQueue[ToCompare] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def compare(self, one: ToCompare) -> None:
        if self._thread is None:
            # a daemon: nobody waits for an answer when the worker ends
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._given.put(one)

    def _run(self) -> None:
        outbox = Outbox(self._run_dir)
        while True:
            one = self._given.get()
            difference = compare(self._folder, one.content)
            outbox.send(self._process, TokenizerCompared(one.tokenizer, difference), self._index)
