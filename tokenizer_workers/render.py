"""`python -m tokenizer_workers.render FD`: renders chat templates that nobody vouches for.

A process without secrets in its environment, with little memory and no right to write files, that
the kernel ends when a prompt takes too much processor time, in whatever it is by then. Jobs and
results are MessagePack behind their length, over the socket FD; it ends when that is closed.
"""

import functools
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from pipeline.errors import RequestError
from pipeline.framing import bodies, send
from pipeline.messages import ChatOptions, Failure, FailureKind, Tools
from pipeline.parent import die_with_parent
from tokenizer_workers.chat_template import RENDER_ERRORS, ChatTemplate, NotATemplate
from tokenizer_workers.tool_formats import FORMATS, ToolFormat
from tokenizer_workers.tool_use import ToolUse

MAX_COMPILED = 128  # templates that are kept for the next prompt, while there is memory
READY = b""


class TemplateLimits(msgspec.Struct, frozen=True):
    """What a template is given of the model, and what it may write."""

    special_tokens: dict[str, str]
    max_characters: int
    tool_format: str = "hermes"  # of FORMATS, in which tools are explained where it shows none


class Job(msgspec.Struct, frozen=True, array_like=True):
    """A chat to be rendered with the template of its options."""

    messages: list[dict[str, Any]]
    options: ChatOptions
    tools: Tools | None = None
    special_tokens: dict[str, str] | None = None  # instead of the model's


class Result(msgspec.Struct, frozen=True, array_like=True):
    """The prompt, or why there is none."""

    text: str = ""
    failure: Failure | None = None


def main(connection: socket.socket, limits: TemplateLimits, seconds: float, nbytes: int) -> None:
    """Serve until the other end is closed; in the middle of a template, too."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the end of this process
    decoder = msgspec.msgpack.Decoder(Job)
    send(connection, READY)
    _give_up_rights(nbytes)

    @functools.lru_cache(MAX_COMPILED)
    def compiled(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
        return ChatTemplate(source, dict(special_tokens), limits.max_characters)

    def rendered(job: Job) -> str:
        tokens = limits.special_tokens if job.special_tokens is None else job.special_tokens
        template = compiled(job.options.template, tuple(tokens.items()))
        messages, tools = chat_for(template, FORMATS[limits.tool_format], job)
        return template.render(messages, tools, job.options)

    memory = os.open("/proc/self/statm", os.O_RDONLY)
    plenty = (_address_space(memory) + nbytes) // 2
    for body in bodies(connection):
        job = decoder.decode(body)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        result = _result(rendered, job)
        if result is None:  # what is kept of other templates may be what takes the memory
            compiled.cache_clear()
            result = _result(rendered, job) or _failed("the chat template needs too much memory")
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(connection, msgspec.msgpack.encode(result))
        if _address_space(memory) > plenty:  # or there might be no room to take the next job
            compiled.cache_clear()


def _address_space(descriptor: int) -> int:
    """Bytes, of /proc/self/statm: what RLIMIT_AS limits."""
    return int(os.pread(descriptor, 64, 0).split()[0]) * resource.getpagesize()


def _result(rendered: Callable[[Job], str], job: Job) -> Result | None:
    """None if there was not enough memory."""
    try:
        return Result(rendered(job))
    except NotATemplate as error:
        return _failed(error.sentence)
    except RequestError as error:
        return Result(failure=Failure(error.status, FailureKind(error.kind), error.message))
    except MemoryError:
        return None
    except RENDER_ERRORS as error:  # of its compilation
        return _failed(f"the chat template cannot be used: {error}")


def chat_for(
    template: ChatTemplate, form: ToolFormat, job: Job
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and tools, as the template takes them."""
    use = ToolUse(
        form,
        template_shows_tools=template.shows_tools,
        template_takes_system=template.takes_system,
        token_id=lambda text: None,
    )
    return use.chat(job.messages, job.tools)


def _failed(sentence: str) -> Result:
    return Result(failure=Failure(422, FailureKind.TEMPLATE, sentence))


def _give_up_rights(nbytes: int) -> None:
    """Nothing of this comes back."""
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))


if __name__ == "__main__":
    main(
        socket.socket(fileno=int(sys.argv[1])),
        msgspec.json.decode(sys.argv[2], type=TemplateLimits),
        float(sys.argv[3]),
        int(sys.argv[4]),
    )
