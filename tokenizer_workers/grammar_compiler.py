"""A process that compiles grammars and can be killed, and the one that has it.

It is started by a tokenizer worker and ends with it. The library's limits bound its time and memory
for almost every grammar; a process bounds them for all. What passes here is compiled again in the
GPU worker, and followed there, so a few tokens of a random reply are tried as well.
"""

import random
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from select import select
from typing import IO

from llguidance import LLMatcher, LLTokenizer

from pipeline.grammars import GrammarError, compile_grammar, load_vocabulary
from pipeline.model_config import ModelConfig
from pipeline.parent import die_with_parent

MEMORY_BYTES = 4 << 30  # of addresses; the vocabulary takes a quarter of a GiB of memory
STEP_SECONDS = 0.5  # of a processor, for one token; it is 0.01 where the library's limits hold
PROBED_TOKENS = 48
UNABLE = "grammars cannot be compiled here"
LENGTH = struct.Struct("<I")


class Compiler:
    """The process, from outside. It is started when it is needed, and again after it was killed.

    seconds  that it has for one grammar, its start aside
    """

    def __init__(self, folder: Path, config: ModelConfig, *, seconds: float) -> None:
        eos = [str(token) for token in config.eos_token_ids]
        self._arguments = [str(folder), str(config.vocabulary), *eos]
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def error_of(self, source: str) -> str:
        """Why a grammar cannot be had; empty if it can. Waits for the answer, or for the time to
        be over."""
        for _ in range(2):  # it may have died since the last time
            if self._process is None and (unable := self._start()):
                return unable
            try:
                error = self._ask(source)
            except BrokenPipeError:
                self.close()
                continue
            if error is None:
                self.close()
                return f"the grammar is too complex: it took more than {self._seconds:g} s or 4 GiB"
            return error
        return UNABLE

    def _start(self) -> str:
        """Returns why it cannot work."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokenizer_workers.grammar_compiler", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        unable = self._answer(None)
        if unable is None or unable:
            self.close()
        return UNABLE if unable is None else unable

    def _ask(self, source: str) -> str | None:
        assert self._process is not None
        assert self._process.stdin is not None
        _write(self._process.stdin, source)
        return self._answer(self._seconds)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def _answer(self, seconds: float | None) -> str | None:
        assert self._process is not None
        assert self._process.stdout is not None
        readable, _, _ = select([self._process.stdout], [], [], seconds)
        return _read(self._process.stdout) if readable else None


def _write(pipe: IO[bytes], text: str) -> None:
    data = text.encode()
    pipe.write(LENGTH.pack(len(data)) + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> str | None:
    """None at the end, also where that comes in the middle: the process has died."""
    head = pipe.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = pipe.read(length)
    return data.decode() if len(data) == length else None


def _sources() -> Iterator[str]:
    while (source := _read(sys.stdin.buffer)) is not None:
        yield source


def probe(matcher: LLMatcher, seed: int, step_seconds: float = STEP_SECONDS) -> None:
    """Follow a random reply for a while. Raises GrammarError if that is too slow."""
    draw = random.Random(seed)
    for _ in range(PROBED_TOKENS):
        start = time.process_time()
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_stopped():
            return
        token = _nth(mask, draw.randrange(mask.bit_count()))
        matcher.consume_token(token)
        if time.process_time() - start > step_seconds:
            raise GrammarError("the grammar is too complex: a token takes too long")


def _nth(mask: int, n: int) -> int:
    """Which bit is the n-th that is set."""
    bits = bin(mask)[:1:-1]
    place = -1
    for _ in range(n + 1):
        place = bits.index("1", place + 1)
    return place


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    folder, size, *eos = sys.argv[1:]
    vocabulary: LLTokenizer | None = None
    error = ""
    try:
        vocabulary = load_vocabulary(
            Path(folder), eos_token_ids=tuple(map(int, eos)), size=int(size)
        )
    except GrammarError as unable:
        error = str(unable)
    _write(sys.stdout.buffer, error)
    for source in _sources():
        error = ""
        try:
            assert vocabulary is not None
            probe(compile_grammar(vocabulary, source), len(source))
        except GrammarError as refused:
            error = str(refused)
        _write(sys.stdout.buffer, error)


if __name__ == "__main__":
    main()
