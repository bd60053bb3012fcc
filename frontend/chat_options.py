"""How a chat is to become a prompt, as clients of vLLM say it."""

from typing import Any, Protocol

from frontend.parameters import ParameterError, check_travels
from pipeline.messages import ChatOptions

# What a template finds under these names is given by other fields.
RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "documents",
        "messages",
        "tokenize",
        "tools",
    }
)


class Fields(Protocol):
    """The fields of a request."""

    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    documents: list[dict[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None


def chat_options(given: Fields, *, allow_template: bool) -> ChatOptions:
    """Raises ParameterError.

    allow_template   whether a request may bring a template of its own
    """
    if given.chat_template and not allow_template:
        raise ParameterError(
            "chat_template",
            "`chat_template` is not allowed at this server (allow_chat_template is off)",
        )
    goes_on = bool(given.continue_final_message)
    if goes_on and given.add_generation_prompt:
        raise ParameterError(
            "continue_final_message",
            "`continue_final_message` and `add_generation_prompt` cannot both be true",
        )
    variables = given.chat_template_kwargs or {}
    for name in sorted(variables.keys() & RESERVED):
        raise ParameterError(
            f"chat_template_kwargs.{name}", f"`chat_template_kwargs` cannot hold `{name}`"
        )
    for name, value in (("chat_template_kwargs", variables), ("documents", given.documents)):
        check_travels(name, value)
    prompts = not goes_on if given.add_generation_prompt is None else given.add_generation_prompt
    return ChatOptions(
        template=given.chat_template or "",
        documents=given.documents,
        variables=variables,
        add_generation_prompt=prompts,
        continue_final_message=goes_on,
        add_special_tokens=bool(given.add_special_tokens),
    )
