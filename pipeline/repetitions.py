"""How often regular expressions repeat what repeats: pure.

`(a{100}){100}` says 10,000 in few characters. What follows from such a number of ways to read a
text is the one cost that the library of grammars does not bound by itself.
"""

import re

MAX_NESTED = 2_000  # repetitions inside repetitions, multiplied
COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
TERMINAL = re.compile(r"^[ \t]*_?[A-Z][\w-]*(?:\.\d+)?[ \t]*:((?:.|\n[ \t]*\|)*)", re.MULTILINE)
LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\\n])+/')


def nested(pattern: str) -> int:
    """The largest product of counts that stand in each other. A count without an end counts as its
    beginning, and a star or plus as 1."""
    groups = [1]  # of each open group, the largest product so far
    last = 1  # of what a count would repeat
    place = 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            last, place = 1, place + 2
        elif character == "[":
            last, place = 1, _class_end(pattern, place)
        elif character == "(":
            groups.append(1)
            last, place = 1, place + 1
        elif character == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] = max(groups[-1], last)
            place += 1
        elif character == "{" and (count := COUNT.match(pattern, place)):
            last *= max(1, int(count[3] or count[1] or 0))
            groups[-1] = max(groups[-1], last)
            place = count.end()
        elif character in "*+?":
            place += 1  # what it repeats may be repeated again
        else:
            last, place = 1, place + 1
    return max(groups)


def _class_end(pattern: str, start: int) -> int:
    """Behind the `]` of a class in brackets. One that comes first is a member."""
    place = start + 1
    if pattern[place : place + 1] == "^":
        place += 1
    if pattern[place : place + 1] == "]":
        place += 1
    while place < len(pattern) and pattern[place] != "]":
        place += 2 if pattern[place] == "\\" else 1
    return place + 1


def nested_in_lark(grammar: str) -> int:
    """The same of a Lark grammar: a terminal may hold any other, so all of them are multiplied.
    What rules repeat costs nothing."""
    product = max([1, *(nested(literal[1:-1]) for literal in _literals(grammar))])
    of_terminals = 1
    for definition in TERMINAL.finditer(grammar):
        of_terminals *= _in_terminal(definition[1])
    return max(product, of_terminals)


def _literals(grammar: str) -> list[str]:
    return [found for found in LITERAL.findall(grammar) if found[0] == "/"]


def _in_terminal(definition: str) -> int:
    """A literal is an atom whose own product counts."""
    atoms: list[int] = []

    def atom(found: "re.Match[str]") -> str:
        literal = found[0]
        atoms.append(nested(literal[1:-1]) if literal[0] == "/" else 1)
        return "x"

    bare = re.sub(r"~\s*(\d+)(?:\.\.(\d+))?", _as_count, LITERAL.sub(atom, definition))
    return nested(re.sub(r"\s+(?=[{*+?])", "", bare)) * max([1, *atoms])


def _as_count(found: "re.Match[str]") -> str:
    return f"{{{found[1]},{found[2] or found[1]}}}"
