"""Chats that wait until templates that nobody vouches for have made texts of them: pure."""

import msgspec

from pipeline.messages import REQUEST_BITS, ChatOptions, Prompt


class ToRender(msgspec.Struct, frozen=True):
    """A chat and what makes text of it: a template of its request, or its adapter's."""

    prompt: Prompt
    template: str
    special_tokens: dict[str, str] | None  # the template's variables; None: the base model's


class Renderings:
    """The prompts that wait, by request; its length is their number."""

    def __init__(self) -> None:
        self._waiting: dict[int, Prompt] = {}
        self._to_render: list[ToRender] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._waiting

    def add(
        self, prompt: Prompt, template: str, special_tokens: dict[str, str] | None = None
    ) -> None:
        """See ToRender."""
        self._waiting[prompt.request_id] = prompt
        self._to_render.append(ToRender(prompt, template, special_tokens))

    def take(self) -> list[ToRender]:
        """Those that are to be rendered and that nobody has cancelled."""
        chats = [one for one in self._to_render if one.prompt.request_id in self._waiting]
        self._to_render = []
        return chats

    def done(self, request_id: int) -> Prompt | None:
        """It waits no more; None if it did not."""
        return self._waiting.pop(request_id, None)

    def forget(self, frontend: int) -> None:
        """Nobody waits for its prompts any more."""
        for request_id in [one for one in self._waiting if one >> REQUEST_BITS == frontend]:
            self.done(request_id)


def as_text(prompt: Prompt, text: str) -> Prompt:
    """The prompt of a chat that has become this text."""
    return msgspec.structs.replace(
        prompt,
        chat=None,
        text=text,
        add_special_tokens=prompt.chat_options.add_special_tokens,
        chat_options=ChatOptions(),
    )
