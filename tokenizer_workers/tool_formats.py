"""How models write calls of tools: pure.

All write a call as a JSON object with its name and arguments; they differ in what is around it.
"""

import msgspec


class ToolFormat(msgspec.Struct, frozen=True):
    """One way to write calls.

    begin      text, or a token's, that comes before calls
    end        what comes behind each call; each has its own `begin` then. Else one stands for all
    arguments  what the key of the arguments is called; the first is what is asked for
    is_list    the calls are the elements of a JSON list
    is_bare    a reply may begin with a call without `begin`
    between    what separates calls
    """

    begin: str
    end: str = ""
    arguments: tuple[str, ...] = ("arguments",)
    is_list: bool = False
    is_bare: bool = False
    between: str = "\n"


FORMATS = {
    # Hermes and Qwen
    "hermes": ToolFormat(begin="<tool_call>", end="</tool_call>"),
    # Llama 3.1 and later, which mark only calls of built-in tools
    "llama": ToolFormat(
        begin="<|python_tag|>", arguments=("parameters", "arguments"), is_bare=True, between="; "
    ),
    "mistral": ToolFormat(begin="[TOOL_CALLS]", is_list=True, between=", "),
}
ASSUMED = "hermes"  # for models that were not taught any; it is the easiest to follow


def format_of(template: str | None) -> str:
    """The key of FORMATS that a chat template speaks of."""
    for name, one in FORMATS.items():
        if template and one.begin in template:
            return name
    if template and '"parameters": ' in template and "ipython" in template:
        return "llama"
    return ASSUMED
