"""From a prompt to checked token ids."""

from array import array
from collections.abc import Callable

import msgspec
from tokenizers import Encoding, Tokenizer

from pipeline.errors import RequestError
from pipeline.grammars import GrammarError, source_of
from pipeline.messages import Failure, FailureKind, Prompt, Tokenize, Tokenized
from tokenizer_workers.chat_template import ChatTemplate
from tokenizer_workers.tool_calls import ToolCallParser
from tokenizer_workers.tool_use import ToolUse


class Encoded(msgspec.Struct, frozen=True):
    """A prompt that may run: prompt and reply fit the context."""

    token_ids: bytes  # int32[prompt_tokens], at least one
    prompt_tokens: int
    max_tokens: int  # at least one
    grammar: str = ""  # as the library writes it; nobody has compiled it yet
    new_parser: Callable[[], ToolCallParser] | None = None  # of a reply that may call tools


class Encoder:
    """Turns prompts into token ids.

    chat_template      None when the model has none, and chats are refused
    vocabulary         of the model; greater ids are refused
    max_total_tokens   of prompt and reply together
    token_characters   the longest token's
    tool_use           how the model calls tools; None: tools are not read
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        vocabulary: int,
        max_total_tokens: int,
        token_characters: int,
        tool_use: ToolUse | None = None,
    ) -> None:
        self._tool_use = tool_use
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._vocabulary = vocabulary
        self._max_total_tokens = max_total_tokens
        self._max_characters = max_total_tokens * token_characters

    def encode(self, prompt: Prompt) -> Encoded:
        """Raises RequestError, with the sentence for the client."""
        if not all(prompt.stop):
            raise _invalid("`stop` strings cannot be empty")
        self._check_truncate(prompt.truncate)
        ids = self._token_ids(prompt)
        count = len(ids)
        if not count:
            raise _invalid("the prompt is empty: it has no tokens")
        if count >= self._max_total_tokens:
            raise _invalid(
                f"`inputs` must have less than {self._max_total_tokens} tokens. Given: {count}"
            )
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            wrong = next(one for one in ids if not 0 <= one < self._vocabulary)
            raise _invalid(f"token id {wrong} is not in the vocabulary of {self._vocabulary}")
        self._check_named(prompt)
        room = self._max_total_tokens - count
        max_tokens = room if prompt.max_tokens is None else prompt.max_tokens
        if max_tokens > room:
            raise _invalid(
                f"`inputs` tokens + `max_new_tokens` must be <= {self._max_total_tokens}. "
                f"Given: {count} `inputs` tokens and {max_tokens} `max_new_tokens`"
            )
        return Encoded(
            ids.tobytes(),
            count,
            max_tokens,
            grammar=self._grammar(prompt),
            new_parser=self._tool_use.new_parser(prompt.tools) if self._tool_use else None,
        )

    def _grammar(self, prompt: Prompt) -> str:
        try:
            grammar = self._tool_use.grammar(prompt) if self._tool_use else prompt.grammar
            source = source_of(grammar) if grammar else ""
        except GrammarError as error:
            raise RequestError(422, FailureKind.GRAMMAR, str(error)) from None
        if source and prompt.ignore_eos:
            raise _invalid("a reply with a grammar ends with it: `ignore_eos` cannot be set")
        if source and prompt.sampling.min_tokens:
            raise _invalid("a reply with a grammar ends with it: `min_tokens` cannot be set")
        return source

    def tokenized(self, question: Tokenize) -> Tokenized:
        """What is asked about; the text may be as long as a prompt."""
        try:
            encoding = self._encode_whole(question.text, question.add_special_tokens)
        except RequestError as error:
            failure = Failure(error.status, FailureKind(error.kind), error.message)
            return Tokenized(question.question_id, failure=failure)
        return Tokenized(
            question_id=question.question_id,
            token_ids=array("i", encoding.ids).tobytes(),
            texts=tuple(encoding.tokens),
            spans=array("i", [at for span in encoding.offsets for at in span]).tobytes(),
        )

    def _check_truncate(self, truncate: int | None) -> None:
        """The sentence, and its range, are LoRAX's."""
        if truncate is not None and not 0 < truncate < self._max_total_tokens:
            raise _invalid(
                "`truncate` must be strictly positive and less than "
                f"{self._max_total_tokens - 1}. Given: {truncate}"
            )

    def _check_named(self, prompt: Prompt) -> None:
        """Tokens that parameters name are those of the model."""
        named = [("logit_bias", token_id) for token_id, _ in prompt.sampling.logit_bias]
        named += [("stop_token_ids", token_id) for token_id in prompt.stop_token_ids]
        for parameter, token_id in named:
            if not 0 <= token_id < self._vocabulary:
                raise _invalid(
                    f"`{parameter}` names token id {token_id}, which is not in the vocabulary of "
                    f"{self._vocabulary}"
                )

    def _token_ids(self, prompt: Prompt) -> "array[int]":
        if prompt.token_ids is not None:
            ids = array("i", prompt.token_ids)
            return ids if prompt.truncate is None else ids[-prompt.truncate :]
        if prompt.chat is None:
            text, special = prompt.text or "", prompt.add_special_tokens
        elif self._chat_template is None:
            raise RequestError(400, FailureKind.TEMPLATE, "the model has no chat template")
        else:
            messages, tools = prompt.chat, None
            if self._tool_use is not None:
                messages, tools = self._tool_use.chat(prompt.chat, prompt.tools)
            text = self._chat_template.render(messages, tools, prompt.chat_options)
            special = prompt.chat_options.add_special_tokens
        if prompt.truncate is None:
            return array("i", self._encode_whole(text, special).ids)
        return array("i", self._encode_end(text, special, prompt.truncate))

    def _encode_whole(self, text: str, special: bool) -> Encoding:
        if len(text) > self._max_characters:  # before the time is spent that others wait for
            raise _invalid(
                f"`inputs` must have less than {self._max_total_tokens} tokens. "
                f"Given: {len(text)} characters, which cannot be so few"
            )
        return self._tokenizer.encode(text, add_special_tokens=special)

    def _encode_end(self, text: str, special: bool, count: int) -> list[int]:
        """The last `count` tokens, among them those that the tokenizer puts around the text, if
        that leaves room for any of the text."""
        end = text[-self._max_characters :]  # has more tokens than are kept, whatever they are
        encoding = self._tokenizer.encode(end, add_special_tokens=False)
        around = self._tokenizer.num_special_tokens_to_add(is_pair=False) if special else 0
        if around >= count:
            return list(encoding.ids[-count:])
        encoding.truncate(count - around, direction="left")
        return list(self._tokenizer.post_process(encoding, add_special_tokens=special).ids)


def _invalid(sentence: str) -> RequestError:
    return RequestError(400, FailureKind.VALIDATION, sentence)
