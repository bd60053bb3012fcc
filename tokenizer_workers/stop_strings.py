"""Stop strings in a text that comes in pieces: pure.

The match that ends first in the text wins, and of those that end together the longest, however the
text was cut into pieces. Text that may be the beginning of a stop string is held back.
"""

from collections.abc import Sequence


class StopStrings:
    """Watches one text.

    stop   strings, none of them empty
    keep   leave the matched stop string in the text
    """

    __slots__ = ("_held", "_keep", "_matchers", "matched")

    def __init__(self, stop: Sequence[str], keep: bool) -> None:
        self._matchers = [_Matcher(string) for string in stop]
        self._keep = keep
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that can be shown now. Sets `matched`, after which nothing is pushed."""
        first: tuple[int, int] | None = None  # end in `text`, minus the length
        for matcher in self._matchers:
            end = matcher.push(text)
            if end is not None:
                found = (end, -matcher.length)
                first = found if first is None else min(first, found)
        shown = self._held + text
        if first is not None:
            end, minus_length = first
            self.matched = True
            end += len(self._held)
            self._held = ""
            return shown[: end if self._keep else end + minus_length]
        held = max(matcher.partial for matcher in self._matchers)
        self._held = shown[len(shown) - held :]
        return shown[: len(shown) - held]

    def finish(self) -> str:
        """What was held back; the text has ended without a match."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Finds one string by Knuth, Morris and Pratt: each character of the text is read once.

    partial   characters at the end of the text so far that are the string's beginning
    """

    __slots__ = ("_borders", "_string", "length", "partial")

    def __init__(self, string: str) -> None:
        self._string = string
        self.length = len(string)
        self.partial = 0
        self._borders = _borders(string)

    def push(self, text: str) -> int | None:
        """Where in `text` the first match ends, if there is one."""
        string, borders, partial = self._string, self._borders, self.partial
        if not partial and string[0] not in text:
            return None
        for position, character in enumerate(text):
            while partial and string[partial] != character:
                partial = borders[partial - 1]
            if string[partial] == character:
                partial += 1
                if partial == self.length:
                    return position + 1
        self.partial = partial
        return None


def _borders(string: str) -> list[int]:
    """[i]: the length of the longest proper prefix of string[: i + 1] that is also its end."""
    borders = [0] * len(string)
    border = 0
    for position in range(1, len(string)):
        while border and string[position] != string[border]:
            border = borders[border - 1]
        if string[position] == string[border]:
            border += 1
        borders[position] = border
    return borders
