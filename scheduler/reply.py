"""What one tokenizer worker is to be told next."""

from pipeline.messages import Finished, Tokens


class Reply:
    """Collects one Tokens message."""

    __slots__ = ("finished", "logprobs", "request_ids", "token_ids")

    def __init__(self) -> None:
        self.request_ids: list[int] = []
        self.token_ids: list[int] = []
        self.logprobs: dict[int, bytes] = {}
        self.finished: list[Finished] = []

    def take(self) -> Tokens | None:
        """The message, or None if there is nothing to say; then starts anew."""
        if not self.request_ids and not self.finished:
            return None
        message = Tokens(
            self.request_ids, self.token_ids, self.logprobs, finished=tuple(self.finished)
        )
        self.request_ids, self.token_ids, self.logprobs, self.finished = [], [], {}, []
        return message
