"""rank_pattern and alpha_pattern: which key of such a table holds for a module.

A key is a regular expression that has to match the end of the module's name, from a dot or the
start on; the first key that matches wins (PEFT's get_pattern_key). A key comes from whoever wrote
the adapter, and Python's matcher may take exponential time, during which nothing else in the
process runs. So keys that repeat or branch are matched in a child process with a CPU limit:
this file, run as a script, which is why it imports the standard library only.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence

MAX_KEYS = 2_000  # one for each module of 250 layers
CPU_SECONDS = 2
CHILD_BYTES = 1 << 30  # of address space
_PLAIN = re.compile(r"[\w.^$-]|\\[.$^-]", re.ASCII)


class PatternError(ValueError):
    """The keys cannot be used; the text says why."""


def first_matches(keys: Iterable[str], names: Sequence[str]) -> list[str | None]:
    """For each name the first key that matches it, or None. Raises PatternError."""
    ordered = list(keys)
    if not ordered or not names:
        return [None] * len(names)
    if len(ordered) > MAX_KEYS:
        raise PatternError(f"has {len(ordered)} keys, and {MAX_KEYS} is the most")
    if all(_is_plain(key) for key in ordered):
        found = match_all(ordered, names)
    else:
        found = _match_in_child(ordered, names)
    return [None if index is None else ordered[index] for index in found]


def match_all(keys: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name the index of the first key that matches it. Raises PatternError."""
    compiled: list[re.Pattern[str]] = []
    for key in keys:
        try:
            compiled.append(re.compile(rf"(.*\.)?({key})$"))
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(f"has the key {key[:100]!a}, which is not a pattern") from error
    return [
        next((index for index, pattern in enumerate(compiled) if pattern.match(name)), None)
        for name in names
    ]


def _is_plain(key: str) -> bool:
    """Whether matching the key takes no longer than comparing it."""
    return not _PLAIN.sub("", key)


def _match_in_child(keys: Sequence[str], names: Sequence[str]) -> list[int | None]:
    request = json.dumps([keys, names])
    command = [sys.executable, "-I", "-S", "-W", "ignore", __file__]
    try:
        child = subprocess.run(
            command,
            input=request.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10 * CPU_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise PatternError("takes too long to match") from error
    if child.returncode:
        raise PatternError("takes too long to match")
    answer = json.loads(child.stdout)
    if isinstance(answer, str):
        raise PatternError(answer)
    return list(answer)


def _be_child() -> None:
    """Read [keys, names] from stdin, write the indices, or the text of a PatternError."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, CHILD_BYTES))
    keys, names = json.load(sys.stdin.buffer)
    answer: list[int | None] | str
    try:
        answer = match_all(keys, names)
    except PatternError as error:
        answer = str(error)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _be_child()
