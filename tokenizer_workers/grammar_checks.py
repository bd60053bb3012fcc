"""The thread that has grammars compiled, so that nobody's text waits for it."""

import threading
from queue import SimpleQueue

from pipeline.channels import Outbox
from pipeline.config import Settings
from pipeline.messages import GrammarChecked
from tokenizer_workers.grammar_compiler import Compiler


class GrammarChecks:
    """Has compiled what it is given, one after the other; the answers go to this process's own
    inbox."""

    def __init__(self, settings: Settings, process: str, index: int, compiler: Compiler) -> None:
        self._run_dir = settings.run_folder()
        self._process = process
        self._index = index
        self._compiler = compiler
        self._sources: SimpleQueue[str | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def check(self, source: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._sources.put(source)

    def close(self) -> None:
        """What was given has been compiled."""
        if self._thread is not None:
            self._sources.put(None)
            self._thread.join()

    def _run(self) -> None:
        outbox = Outbox(self._run_dir)
        while (source := self._sources.get()) is not None:
            error = self._compiler.error_of(source)
            outbox.send(self._process, GrammarChecked(source, error), self._index)
        self._compiler.close()
        outbox.close(0)
