"""What one tokenizer worker is to be told next."""

from pipeline.messages import Finished, Tokens


class Reply:
    """Collects one Tokens message."""

    __slots__ = ("finished", "logprobs", "request_ids", "token_ids")

    def __init__(self) -> None:
        self._clear()

    def take(self) -> Tokens:
        """The message; then starts anew."""
        message = Tokens(self.request_ids, self.token_ids, self.logprobs, tuple(self.finished))
        self._clear()
        return message

    def _clear(self) -> None:
        self.request_ids: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: dict[int, bytes] = {}
        self.finished: list[Finished] = []
