"""Chat templates: the Jinja dialect of Hugging Face tokenizers, in its sandbox.

Equal to transformers' `apply_chat_template`. The base model's template is the operator's to vouch
for; its messages come from clients. A template that nobody vouches for is rendered by the same
code in a process of its own, see render.py.
"""

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import ConfigError, RequestError
from pipeline.messages import ChatOptions, FailureKind

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# what a template may raise over messages that it was not made for
RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

NO_OPTIONS = ChatOptions()
# put after a message that is to go on; what follows it is cut off, and its space shows trimming
GOES_ON = "<|loradex-goes-on|> "

Message = dict[str, Any]


class NotATemplate(ConfigError):
    """The source of a template that is none."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"model_id: {sentence}")
        self.sentence = sentence


class ChatTemplate:
    """A compiled template and the special tokens that it may name.

    A message's content is text or a list of parts `{"type": "text", "text": ...}`. Most templates
    want text and get it, the parts joined; one that shows nothing of a text gets parts.

    max_characters   of a prompt

    Raises NotATemplate.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        max_characters: int | None = None,
    ) -> None:
        self._max_characters = max_characters
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise NotATemplate(
                f"the chat template cannot be used: {error.message} (line {error.lineno})"
            ) from error
        self._wants_parts = not self._shows("probe") and self._shows(
            [{"type": "text", "text": "probe"}]
        )
        self.shows_tools = self._shows_tools()
        self.takes_system = self._takes_system()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        options: ChatOptions = NO_OPTIONS,
    ) -> str:
        """The prompt. Raises RequestError for messages that the template does not take.

        tools   for a template that shows them
        """
        if not messages:
            raise RequestError(400, FailureKind.VALIDATION, "`messages` cannot be empty")
        normal = [self._normal(message) for message in messages]
        if not options.continue_final_message:
            return self._render(normal, tools, options)
        normal[-1] = _going_on(normal[-1])
        return _cut(self._render(normal, tools, options))

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        options: ChatOptions = NO_OPTIONS,
    ) -> str:
        variables = {
            **self._special_tokens,
            **options.variables,
            "messages": messages,
            "tools": tools,
            "documents": options.documents,
            "add_generation_prompt": options.add_generation_prompt,
        }
        try:
            return self._bounded(self._template.generate(variables))
        except RENDER_ERRORS as error:
            raise RequestError(422, FailureKind.TEMPLATE, f"{error}{_place(error)}") from error

    def _bounded(self, parts: Iterator[str]) -> str:
        """All of it, if it is not too long."""
        if self._max_characters is None:
            return "".join(parts)
        taken: list[str] = []
        left = self._max_characters
        for part in parts:
            left -= len(part)
            if left < 0:
                raise RequestError(
                    422,
                    FailureKind.TEMPLATE,
                    f"the chat template writes more than {self._max_characters} characters",
                )
            taken.append(part)
        return "".join(taken)

    def _normal(self, message: Message) -> Message:
        """Without what is None, and with the content in the form that the template wants."""
        normal = {key: value for key, value in message.items() if value is not None}
        content = normal.get("content")
        if isinstance(content, list):
            texts = [_text_of(part) for part in content]
            normal["content"] = (
                [{"type": "text", "text": text} for text in texts]
                if self._wants_parts
                else "".join(texts)
            )
        elif isinstance(content, str) and self._wants_parts:
            normal["content"] = [{"type": "text", "text": content}]
        return normal

    def _shows(self, content: str | list[Message]) -> bool:
        """Whether a user's message with this content leaves a trace of it in the prompt."""
        try:
            return "probe" in self._render([{"role": "user", "content": content}])
        except RequestError:
            return False

    def _shows_tools(self) -> bool:
        """Whether a tool leaves a trace of its name in the prompt."""
        parameters = {"type": "object", "properties": {}}
        function = {"name": "probe", "description": "", "parameters": parameters}
        message = self._normal({"role": "user", "content": "hello"})
        try:
            return "probe" in self._render([message], [{"type": "function", "function": function}])
        except RequestError:
            return False

    def _takes_system(self) -> bool:
        """Whether a system message leaves a trace in the prompt."""
        messages = [
            {"role": "system", "content": "probe"},
            {"role": "user", "content": "hello"},
        ]
        try:
            return "probe" in self._render([self._normal(message) for message in messages])
        except RequestError:
            return False


def find_source(config: Mapping[str, Any], jinja_file: str | None) -> str | None:
    """The model's template, or None when it has none.

    config       tokenizer_config.json, where chat_template is a text or a list of named ones
    jinja_file   what chat_template.jinja holds; it wins
    """
    if jinja_file is not None:
        return jinja_file
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {entry["name"]: entry["template"] for entry in given}
        given = named.get("default")
    return given


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """name -> text of the special tokens that tokenizer_config.json names."""
    found = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):  # with its flags
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _text_of(part: object) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            sentence = f"content parts of type `{kind[:40]}` are not supported; only `text` is"
        case _:
            sentence = 'a content part must look like {"type": "text", "text": "..."}'
    raise RequestError(400, FailureKind.VALIDATION, sentence)


def _going_on(message: Message) -> Message:
    """The message with a sign at the end of its last text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + GOES_ON}
    if isinstance(content, list) and content:
        last = {**content[-1], "text": content[-1]["text"] + GOES_ON}
        return {**message, "content": [*content[:-1], last]}
    raise RequestError(
        400, FailureKind.VALIDATION, "the last message has no content that could be continued"
    )


def _cut(prompt: str) -> str:
    """Up to the sign, and without the space before it where the template trims."""
    before, sign, after = prompt.rpartition(GOES_ON.strip())
    if not sign:
        raise RequestError(
            422, FailureKind.TEMPLATE, "the chat template does not show the last message as it is"
        )
    return before if after.startswith(" ") else before.rstrip()


def _place(error: Exception) -> str:
    """The line of the template that it came from, as Jinja tells it in the traceback."""
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == "<template>"
    ]
    return f" (line {lines[-1]})" if lines else ""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only shows its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
