"""What a model needs to be told of tools, and how what it says of them is read."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pipeline.messages import Grammar, Prompt, ToolChoice, Tools
from tokenizer_workers.tool_calls import ToolCallParser
from tokenizer_workers.tool_formats import ToolFormat
from tokenizer_workers.tool_grammars import tool_grammar
from tokenizer_workers.tool_messages import explained, tool_objects, with_argument_objects

Message = dict[str, Any]


class ToolUse:
    """How one base model calls tools.

    template_shows_tools  else they are explained in messages
    template_takes_system whether there may be a system message
    token_id              of a text that is one token which no other text contains
    """

    def __init__(
        self,
        form: ToolFormat,
        *,
        template_shows_tools: bool,
        template_takes_system: bool,
        token_id: Callable[[str], int | None],
    ) -> None:
        self._form = form
        self._template_shows_tools = template_shows_tools
        self._template_takes_system = template_takes_system
        self._token_id = token_id

    def chat(
        self, messages: Sequence[Message], tools: Tools | None
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """The messages and tools that the chat template is to be given."""
        if self._template_shows_tools:
            given = tool_objects(tools) if tools and tools.functions else None
            return with_argument_objects(messages), given
        whole = with_argument_objects(messages)
        takes_system = self._template_takes_system
        return explained(whole, tools, self._form, system=takes_system), None

    def grammar(self, prompt: Prompt) -> Grammar | None:
        """What the reply must match, tool calls included. Raises GrammarError."""
        if prompt.tools is None or not prompt.tools.functions:
            return prompt.grammar
        return tool_grammar(
            self._form, prompt.tools, content=prompt.grammar, token_id=self._token_id
        )

    def new_parser(self, tools: Tools | None) -> Callable[[], ToolCallParser] | None:
        """What makes the reader of a reply; None if it is text whatever it says."""
        if tools is None or not tools.functions or tools.choice is ToolChoice.NONE:
            return None
        names = frozenset(function["name"] for function in tools.functions)
        return partial(ToolCallParser, self._form, names=names, parallel=tools.parallel)
