"""Many SSE streams at once from one process: a client that costs little and checks what it gets.

    python -m benchmarks.load_client HOST PORT STREAMS TOKENS [PROMPTS]

PROMPTS is a JSON file of [model, prompt] for each stream.

Each stream is one POST to /v1/completions over a non-blocking socket. Events are counted, not
parsed, but for the last ones, which say how many tokens there were. Prints one JSON object.
"""

import json
import re
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

RECEIVED_BYTES = 1 << 16
EVENT = b"\ndata: "  # JSON has no line break inside, so that text cannot look like one
END_OF_REPLY = b"data: [DONE]\n\n\r\n0\r\n\r\n"
TAIL_BYTES = 2048
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


class Load(msgspec.Struct, frozen=True):
    """What the streams took. Times are seconds."""

    seconds: float  # from the first request to the last end
    tokens: int
    events: int
    first_token_seconds: float  # from the first request until every stream has a token


class Stream:
    """One reply as it arrives."""

    def __init__(self, host: str, port: int, tokens: int, model: str, prompt: str) -> None:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        content = json.dumps(body).encode()
        self._request = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        ).encode() + content
        self._expected = tokens
        self._tail = b""
        self.events = 0
        self.socket = socket.create_connection((host, port))

    def send(self) -> None:
        self.socket.sendall(self._request)
        self.socket.setblocking(False)

    def receive(self) -> bool:
        """Take what has arrived. True when it was the last; raises SystemExit if it was wrong."""
        data = self.socket.recv(RECEIVED_BYTES)
        if not data:
            raise SystemExit(f"the server closed a stream after {self._tail!r}")
        if not self._tail and not data.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"the server refused a stream: {data!r}")
        # a marker that was cut in two is counted where its last byte arrives
        self.events += (self._tail[1 - len(EVENT) :] + data).count(EVENT)
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        return self._tail.endswith(END_OF_REPLY)

    def check(self) -> None:
        usages = USAGE.findall(self._tail)
        if not usages or int(usages[-1]) != self._expected:
            raise SystemExit(f"{usages} tokens instead of {self._expected}: {self._tail!r}")


def load(host: str, port: int, tokens: int, prompts: Sequence[tuple[str, str]]) -> Load:
    """Run a stream for each (model, prompt) to its end, all at once."""
    selector = selectors.DefaultSelector()
    for model, prompt in prompts:
        stream = Stream(host, port, tokens, model, prompt)
        selector.register(stream.socket, selectors.EVENT_READ, stream)
    everyone: list[Stream] = [key.data for key in selector.get_map().values()]
    started = time.perf_counter()
    for stream in everyone:
        stream.send()
    waiting = set(everyone)  # for their first event
    first = 0.0
    open_streams = len(prompts)
    while open_streams:
        for key, _ in selector.select():
            stream = key.data
            over = stream.receive()
            if waiting and stream.events:
                waiting.discard(stream)
                first = first if waiting else time.perf_counter() - started
            if over:
                selector.unregister(stream.socket)
                open_streams -= 1
    seconds = time.perf_counter() - started
    for stream in everyone:
        stream.check()
        stream.socket.close()
    return Load(
        seconds=seconds,
        tokens=len(prompts) * tokens,
        events=sum(stream.events for stream in everyone),
        first_token_seconds=first,
    )


if __name__ == "__main__":
    _, host, port, streams, tokens, *files = sys.argv
    made = [("", f"Stream {number}: once upon a time") for number in range(int(streams))]
    for file in files:
        made = json.loads(Path(file).read_text())
    result = load(host, int(port), int(tokens), made)
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
