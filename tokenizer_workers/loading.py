"""Everything about text that a base model's folder holds: tokenizer, special tokens, template."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.model_config import ModelConfig, read_model_config
from pipeline.model_folder import model_folder
from tokenizer_workers.chat_template import ChatTemplate, find_source, special_tokens
from tokenizer_workers.decode import (
    ByteFallbackDecoder,
    ByteLevelDecoder,
    PrefixDecoder,
    TextDecoder,
)
from tokenizer_workers.details import Vocabulary
from tokenizer_workers.encode import Encoder
from tokenizer_workers.grammar_compiler import Compiler
from tokenizer_workers.own_texts import BaseTexts
from tokenizer_workers.render import TemplateLimits
from tokenizer_workers.token_table import (
    byte_fallback_table,
    byte_level_table,
    fallback_decoder_config,
)
from tokenizer_workers.tool_formats import FORMATS, ToolFormat, format_of
from tokenizer_workers.tool_use import ToolUse


class TextModel(msgspec.Struct, frozen=True):
    """What a tokenizer worker knows of the base model."""

    encoder: Encoder
    new_decoder: Callable[[], TextDecoder]  # a reply's text, without special tokens
    new_token_decoder: Callable[[], TextDecoder]  # with them, for the details of tokens
    vocabulary: Vocabulary
    new_tool_decoder: Callable[[], TextDecoder]  # without, but for those around calls of tools
    compiler: Compiler  # of grammars
    max_total_tokens: int
    template_limits: TemplateLimits  # for templates that are not the model's
    base_texts: BaseTexts  # that adapters' files are compared with
    folder: Path


def load(settings: Settings) -> TextModel:
    """Read the folder of the base model, fetching it first if need be. Raises ConfigError."""
    folder = model_folder(settings)
    config = read_model_config(folder)
    named = _read_tokenizer_config(folder)
    tokens = special_tokens(named)
    tokenizer = read_tokenizer(folder, tokens)
    jinja_file = folder / "chat_template.jinja"
    source = find_source(named, jinja_file.read_text() if jinja_file.is_file() else None)
    return text_model(
        folder=folder,
        tokenizer=tokenizer,
        chat_template=ChatTemplate(source, tokens) if source else None,
        special_tokens=tokens,
        tokenizer_config=named,
        tool_format=format_of(source) if settings.tool_format == "auto" else settings.tool_format,
        compiler=Compiler(folder, config, seconds=settings.grammar_compile_seconds),
        config=config,
        max_total_tokens=_max_total_tokens(settings, config),
    )


def text_model(
    *,
    folder: Path,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    special_tokens: Mapping[str, str],
    tokenizer_config: Mapping[str, Any],
    tool_format: str,
    compiler: Compiler,
    config: ModelConfig,
    max_total_tokens: int,
) -> TextModel:
    token_characters = max(map(len, tokenizer.get_vocab()))
    added = tokenizer.get_added_tokens_decoder()
    special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
    all_visible = decoders(tokenizer, config.vocabulary, hidden=())
    hidden = special_ids.union(config.eos_token_ids)
    form = FORMATS[tool_format]
    around_calls = {tokenizer.token_to_id(text) for text in (form.begin, form.end)}
    return TextModel(
        encoder=Encoder(
            tokenizer=tokenizer,
            chat_template=chat_template,
            vocabulary=config.vocabulary,
            max_total_tokens=max_total_tokens,
            token_characters=token_characters,
            tool_use=_tool_use(tokenizer, chat_template, form),
        ),
        # an end-of-text token that nobody marked as special is not for the reader either
        new_decoder=decoders(tokenizer, config.vocabulary, hidden=hidden).new,
        new_tool_decoder=decoders(
            tokenizer, config.vocabulary, hidden=hidden.difference(around_calls)
        ).new,
        compiler=compiler,
        new_token_decoder=all_visible.new,
        vocabulary=Vocabulary(all_visible.bytes_of, special_ids),
        max_total_tokens=max_total_tokens,
        template_limits=TemplateLimits(
            dict(special_tokens), max_total_tokens * token_characters, tool_format
        ),
        base_texts=BaseTexts(
            config=tokenizer_config,
            id_of=tokenizer.token_to_id,
            special=frozenset(token.content for token in added.values() if token.special),
            eos_ids=config.eos_token_ids,
            around=_around(tokenizer),
        ),
        folder=folder,
    )


def _around(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and behind a text."""
    text = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    places = range(len(whole) - len(text) + 1)
    at = next((at for at in places if whole[at : at + len(text)] == text), 0)
    return tuple(whole[:at]), tuple(whole[at + len(text) :])


def _tool_use(
    tokenizer: Tokenizer, chat_template: ChatTemplate | None, form: ToolFormat
) -> ToolUse:
    """Without a chat template of the base model, for chats that bring theirs or their adapter's."""
    own = {
        token.content: token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special or (token.content.startswith("<") and token.content.endswith(">"))
    }
    return ToolUse(
        form,
        template_shows_tools=chat_template is not None and chat_template.shows_tools,
        template_takes_system=chat_template is not None and chat_template.takes_system,
        token_id=own.get,
    )


def read_tokenizer(folder: Path, tokens: Mapping[str, str]) -> Tokenizer:
    """The tokenizer, without truncation or padding. Raises ConfigError.

    tokens   special ones by name; those that tokenizer.json does not mark as special become so
    """
    tokenizer = _read_tokenizer(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    marked = {
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    }
    known = [token for token in tokens.values() if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([token for token in known if token not in marked])
    return tokenizer


def base_tokenizers(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    """As the file has it, and with all the special tokens that the folder names, as a copy of it
    has them that was written anew. Raises ConfigError."""
    named = special_tokens(_read_tokenizer_config(folder))
    return _read_tokenizer(folder), read_tokenizer(folder, named)


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"model_id: {folder} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # it raises nothing more precise
        raise ConfigError(f"model_id: {path} cannot be used: {error}") from error


class Decoders(msgspec.Struct, frozen=True):
    new: Callable[[], TextDecoder]  # for one sequence
    bytes_of: Callable[[int], bytes]  # a token's own


def decoders(tokenizer: Tokenizer, vocabulary: int, hidden: Collection[int]) -> Decoders:
    """The fastest decoder that equals the tokenizer's.

    vocabulary   of the model, which may be greater or less than the tokenizer's
    hidden       ids that add nothing to the text
    """
    config = msgspec.json.decode(tokenizer.to_str(), type=_TokenizerFile).decoder
    size = max(vocabulary, tokenizer.get_vocab_size(), *tokenizer.get_vocab().values()) + 1
    tokens = [tokenizer.id_to_token(token_id) for token_id in range(size)]
    if config is not None and config["type"] == "ByteLevel":
        table = byte_level_table(tokens, hidden)
        return Decoders(lambda: ByteLevelDecoder(table), table.bytes_of)
    if (fallback := fallback_decoder_config(config)) is not None:
        replace, strip = fallback
        table = byte_fallback_table(tokens, hidden, replace)
        return Decoders(lambda: ByteFallbackDecoder(table, strip), table.bytes_of)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    return Decoders(
        lambda: PrefixDecoder(decode, hidden), lambda token_id: decode([token_id]).encode()
    )


class _TokenizerFile(msgspec.Struct):
    decoder: dict[str, Any] | None = None


def _read_tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"model_id: {path} is not a JSON object: {error}") from error


def _max_total_tokens(settings: Settings, config: ModelConfig) -> int:
    if settings.max_total_tokens > config.max_positions:
        raise ConfigError(
            f"max_total_tokens: {settings.max_total_tokens} is more than "
            f"the {config.max_positions} positions of the model"
        )
    return settings.max_total_tokens or config.max_positions
