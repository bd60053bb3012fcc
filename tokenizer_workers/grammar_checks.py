"""The thread that finds out whether a grammar can be had, so that nobody's text waits for it."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

from llguidance import LLTokenizer

from pipeline.channels import Outbox
from pipeline.config import Settings
from pipeline.grammars import GrammarError, compile_grammar
from pipeline.messages import GrammarChecked


class GrammarChecks:
    """Compiles what it is given, one after the other; the answers go to this process's own inbox.

    load_vocabulary  raises GrammarError; called once, in the thread
    """

    def __init__(
        self,
        settings: Settings,
        process: str,
        index: int,
        load_vocabulary: Callable[[], LLTokenizer],
    ) -> None:
        self._run_dir = settings.run_folder()
        self._process = process
        self._index = index
        self._load_vocabulary = load_vocabulary
        self._sources: SimpleQueue[str | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def check(self, source: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._sources.put(source)

    def close(self) -> None:
        """What has not been compiled is not any more."""
        if self._thread is not None:
            self._sources.put(None)
            self._thread.join()

    def _run(self) -> None:
        outbox = Outbox(self._run_dir)
        vocabulary: LLTokenizer | None = None
        while (source := self._sources.get()) is not None:
            error = ""
            try:
                vocabulary = vocabulary or self._load_vocabulary()
                compile_grammar(vocabulary, source)
            except GrammarError as refused:
                error = str(refused)
            outbox.send(self._process, GrammarChecked(source, error), self._index)
        outbox.close(0)
