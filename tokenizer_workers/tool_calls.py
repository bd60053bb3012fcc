"""From a reply's text, as it comes, to what it says and the tools that it calls: pure.

A call's name is known before any of its arguments is given, and is given alone. What looks like a
call and is none is text. The arguments are given as the model writes them, bracket by bracket.
"""

import json
from collections.abc import Collection

import msgspec

from pipeline.messages import ToolCallPart
from tokenizer_workers.tool_formats import ToolFormat

SPACE = " \t\r\n"
OTHER_KEYS = frozenset({"type", "id"})  # that a call may have


class Said(msgspec.Struct):
    """What has become certain."""

    text: str = ""
    parts: list[ToolCallPart] = []


class ToolCallParser:
    """Reads one reply.

    names     of the tools; a call without its `begin` must name one of them
    parallel  whether a reply may have several calls; if not, `is_over` is set after the first
    """

    def __init__(self, form: ToolFormat, *, names: Collection[str], parallel: bool = True) -> None:
        self._form = form
        self._names = names
        self._parallel = parallel
        self._held = ""  # not understood yet
        self._raw = ""  # of what may be a call: the text that it is if it is none
        self._space = ""  # shown only if text follows
        self._has_said = False
        self._calls = 0
        self._call: _Call | None = None
        self._step = self._in_text
        self.is_over = False

    def push(self, text: str) -> Said:
        self._held += text
        said = Said()
        while not self.is_over and self._step(said):
            pass
        return said

    def finish(self) -> Said:
        """The reply has ended."""
        said = Said()
        if self._call is not None and self._call.name_is_given:
            return said  # it was cut off in the middle of a call
        rest = self._raw + self._held
        if not self._calls or rest.strip(SPACE + "[],;"):  # more than what separates calls
            self._say(said, rest)
        return said

    def _say(self, said: Said, text: str) -> None:
        text = self._space + text
        rest = text.lstrip(SPACE)
        if not rest and not self._has_said:
            self._space = text
            return
        said.text += rest if self._calls and not self._has_said else text
        self._space = ""
        self._has_said = True

    def _in_text(self, said: Said) -> bool:
        """Returns whether it goes on from here with what is held, as each step does."""
        form, held = self._form, self._held
        found = held.find(form.begin)
        if found >= 0:
            self._say(said, held[:found])
            self._begin(form.begin, held[found + len(form.begin) :])
            return True
        start = held.lstrip(SPACE)
        if form.is_bare and not self._has_said and not self._calls and start[:1] in ("", "{"):
            if start:
                self._begin("", held)
            return bool(start)
        kept = next(n for n in range(len(form.begin) - 1, -1, -1) if held.endswith(form.begin[:n]))
        shown = len(held) - kept
        if shown:
            self._say(said, held[:shown])
        self._held = held[shown:]
        return False

    def _begin(self, raw: str, rest: str) -> None:
        self._raw, self._held = raw, rest
        self._space = ""
        self._has_said = False
        self._step = self._before_call

    def _before_call(self, said: Said) -> bool:
        skipped = SPACE + ("[," if self._form.is_list else ",;")
        rest = self._held.lstrip(skipped)
        self._raw += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not rest:
            return False
        if rest[0] == "{":
            names = self._names if self._form.is_bare and not self._raw.strip(SPACE) else None
            self._call = _Call(self._calls, self._form.arguments, names)
            self._step = self._in_call
            return True
        self._step = self._in_text
        if self._form.is_list and rest[0] == "]" and self._calls:
            self._held = rest[1:]
        else:
            self._say(said, self._raw)
        self._raw = ""
        return True

    def _in_call(self, said: Said) -> bool:
        call = self._call
        assert call is not None
        used = call.push(self._held, said.parts)
        self._raw += self._held[:used]
        self._held = self._held[used:]
        if call.is_broken and not call.name_is_given:
            self._call, self._step = None, self._in_text
            self._say(said, self._raw)
            self._raw = ""
            return True
        if not (call.is_done or call.is_broken):
            return False
        self._call, self._raw = None, ""
        self._calls += 1
        self.is_over = not self._parallel
        self._step = self._behind_call if self._form.end else self._before_call
        return True

    def _behind_call(self, said: Said) -> bool:
        rest = self._held.lstrip(SPACE)
        if self._form.end.startswith(rest) and rest != self._form.end:
            return False  # more of it may come
        self._held = rest.removeprefix(self._form.end)
        self._step = self._in_text
        return True


class _Call:
    """A JSON object that comes in pieces: {"name": ..., "arguments": {...}}."""

    def __init__(self, index: int, argument_keys: tuple[str, ...], names: Collection[str] | None):
        self._index = index
        self._argument_keys = argument_keys
        self._names = names
        self._depth = 0
        self._in_string = self._escaped = False
        self._key = ""  # its value is being read; empty: a key is
        self._text = ""  # of that key or value so far
        self._complete = False  # the value is; what follows is space, until the next key
        self._waiting = ""  # arguments that came before the name
        self._has_arguments = False
        self.name_is_given = False
        self.is_done = self.is_broken = False

    def push(self, text: str, parts: list[ToolCallPart]) -> int:
        """Returns how much of the text belongs to it; adds what is known of it now to parts."""
        arguments = ""
        used = 0
        for character in text:
            used += 1
            arguments += self._take(character, parts)
            if self.is_done or self.is_broken:
                break
        if arguments:
            parts.append(ToolCallPart(self._index, arguments=arguments))
        return used

    def _take(self, character: str, parts: list[ToolCallPart]) -> str:
        """Returns what it adds to the arguments that can be given."""
        if self._in_string:
            return self._in_a_string(character, parts)
        if self._depth == 1 and not self._key:
            return self._before_key(character)
        if self._depth <= 1 and character in ",}":
            return self._value_ends(character, parts)
        if self._complete:
            self.is_broken = character not in SPACE
            return ""
        if self._depth <= 1 and (character in SPACE or (character == ":" and not self._text)):
            return ""
        if character in "{[":
            self._depth += 1
            if self._depth == 1:
                return ""
        elif character in "}]":
            self._depth -= 1
            self._complete = self._depth == 1
        elif character == '"':
            self._in_string = True
        return self._of_value(character)

    def _before_key(self, character: str) -> str:
        if character == '"':
            self._in_string, self._text = True, '"'
        elif character == "}":
            return self._ends()
        elif character not in SPACE:
            self.is_broken = True
        return ""

    def _in_a_string(self, character: str, parts: list[ToolCallPart]) -> str:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            if not self._key:
                self._key, self._text = _string(self._text + character), ""
                known = (*self._argument_keys, "name", *OTHER_KEYS)
                self.is_broken = not self._key or (
                    self._key not in known and self._names is not None
                )
                return ""
            self._complete = self._depth == 1
        if not self._key:
            self._text += character
            return ""
        given = self._of_value(character)
        if self._complete and self._key == "name":
            self._name(_string(self._text), parts)
        return given

    def _of_value(self, character: str) -> str:
        """A character of the value; its arguments are given at once, unless they are a string."""
        self._text += character
        if self._key not in self._argument_keys or self._text[0] == '"':
            return ""
        self._has_arguments = True
        if self.name_is_given:
            return character
        self._waiting += character
        return ""

    def _value_ends(self, character: str, parts: list[ToolCallPart]) -> str:
        given = ""
        if self._key in self._argument_keys and self._text[:1] == '"':
            self._has_arguments = True
            given = _string(self._text)  # JSON in JSON
            if not self.name_is_given:
                self._waiting, given = given, ""
        self._key, self._text, self._complete = "", "", False
        return given + self._ends() if character == "}" else given

    def _ends(self) -> str:
        self.is_done = True
        self.is_broken = not self.name_is_given
        return "" if self._has_arguments or self.is_broken else "{}"

    def _name(self, name: str, parts: list[ToolCallPart]) -> None:
        if self.name_is_given or not name or (self._names is not None and name not in self._names):
            self.is_broken = True
            return
        self.name_is_given = True
        parts.append(ToolCallPart(self._index, name=name))
        if self._waiting:
            parts.append(ToolCallPart(self._index, arguments=self._waiting))


def _string(text: str) -> str:
    """What a JSON string says; empty if it is none."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
