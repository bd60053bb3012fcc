"""Grammars by llguidance: what may be asked for, and at what cost.

Used by tokenizer_workers, which refuse what cannot be had, and by gpu_worker, which follows it.
Nothing here takes long without the interpreter's lock being free, but it may take long: it is
called in threads that keep nobody waiting.
"""

import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from pipeline.messages import Grammar, GrammarKind
from pipeline.repetitions import MAX_NESTED, nested, nested_in_lark

MAX_SOURCE_BYTES = 64 << 10
MAX_MULTIPLE = 100_000  # the library builds an automaton with so many states
# What bounds time and memory, measured with hostile grammars on one core: a second to compile at
# most, 10 ms for a mask, 100 MB for a matcher. What is usual takes 1 ms, 0.05 ms and 1 MB.
LIMITS = LLParserLimits(
    max_items_in_row=500,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=10_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
# Space where JSON allows it, but not so much that a model could go on with it for ever. A schema
# cannot turn off (`x-guidance`) that what is not supported is refused.
JSON_OPTIONS: Any = {
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,24}",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}


class GrammarError(Exception):
    """A grammar, or any grammar with this model, cannot be had; the text is for the client."""


def load_vocabulary(folder: Path, *, eos_token_ids: tuple[int, ...], size: int) -> LLTokenizer:
    """The bytes of each token of the model in `folder`. Raises GrammarError.

    size   tokens of the model; the result's vocab_size may be greater
    """
    if not eos_token_ids:
        raise GrammarError("the model has no token that ends a reply, so no grammar can end one")
    try:
        tokenizer = _tokenizer_file(folder, eos_token_ids)
        source = msgspec.json.encode(tokenizer).decode()
        size = max(size, _tokens(tokenizer))
        return LLTokenizer(source, eos_token=list(eos_token_ids), n_vocab=size)
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise GrammarError(f"the model's tokenizer cannot be used with grammars: {error}") from None


def source_of(grammar: Grammar) -> str:
    """The grammar as the library writes it. Raises GrammarError."""
    if len(grammar.text.encode()) > MAX_SOURCE_BYTES:
        raise GrammarError(f"a grammar has at most {MAX_SOURCE_BYTES} bytes")
    _check_multiples(grammar.text)
    _check_repetitions(grammar)
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            text = "{}" if grammar.text == "true" else grammar.text
            try:
                return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
            except ValueError as error:
                raise GrammarError(f"the JSON schema cannot be used: {error}") from None
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.text)
        case GrammarKind.CHOICE:
            return LLMatcher.grammar_from_lark(lark_choice(grammar.text))
        case GrammarKind.LARK:
            try:
                return LLMatcher.grammar_from_lark(any_to_lark(grammar.text))
            except Exception as error:  # a GBNF that it cannot translate raises anything
                raise GrammarError(f"the grammar cannot be read: {error}") from None


def lark_choice(choices: str) -> str:
    texts = msgspec.json.decode(choices, type=list[str])
    if not texts or not all(texts):
        raise GrammarError("a choice is a list of texts, none of them empty")
    return "start: " + " | ".join(lark_string(text) for text in texts)


def lark_string(text: str) -> str:
    """As a literal in a Lark grammar."""
    return msgspec.json.encode(text).decode()


def compile_grammar(vocabulary: LLTokenizer, source: str) -> LLMatcher:
    """What follows the grammar, at its beginning. Raises GrammarError."""
    matcher = LLMatcher(vocabulary, source, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some limits show only here
    if matcher.is_error():
        raise GrammarError(f"the grammar cannot be used: {_cleaned(matcher.get_error())}")
    return matcher


def _cleaned(error: str) -> str:
    """Without the library's state and options, which are for its users."""
    if error.startswith("NoExtension"):
        return "no text matches it"
    return error.partition("\n<")[0].partition(". Enable '")[0].strip()


def _tokenizer_file(folder: Path, eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """tokenizer.json, with what is special in any way marked as such, so that it is no text."""
    tokenizer = msgspec.json.decode((folder / "tokenizer.json").read_bytes(), type=dict[str, Any])
    special = set(eos_token_ids)
    named = folder / "tokenizer_config.json"
    names: set[str] = set()
    if named.is_file():
        config = msgspec.json.decode(named.read_bytes(), type=dict[str, Any])
        tokens = [value for key, value in config.items() if key.endswith("_token")]
        names = {t.get("content", "") if isinstance(t, dict) else str(t) for t in tokens if t}
    for token in tokenizer.get("added_tokens", ()):
        if token["id"] in special or token["content"] in names:
            token["special"] = True
    tokenizer["truncation"] = tokenizer["padding"] = None
    return tokenizer


def _tokens(tokenizer: dict[str, Any]) -> int:
    """How many there are, up to the greatest id."""
    vocabulary = tokenizer["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [int(token["id"]) for token in tokenizer.get("added_tokens", ())]
    return 1 + max([*map(int, ids), *added])


def _check_multiples(text: str) -> None:
    """`multipleOf` is the one keyword whose cost no limit of the library bounds.

    Raises GrammarError. All in a grammar count together, since they may meet in one number.
    """
    if "ultipleOf" not in (text := re.sub(r"\\u00([0-9a-fA-F]{2})", _character, text)):
        return
    multiples = {
        Decimal(number) for number in re.findall(r'"multipleOf"\s*:\s*(\d[\d.eE+-]*)', text)
    }
    multiples.discard(Decimal(0))
    if not multiples:
        return
    places = max(0, *(-int(multiple.normalize().as_tuple().exponent) for multiple in multiples))
    if places > 30 or max(multiples) > MAX_MULTIPLE:
        common = MAX_MULTIPLE + 1
    else:
        common = math.lcm(*(int(multiple.scaleb(places)) for multiple in multiples))
    if common > MAX_MULTIPLE:
        raise GrammarError(
            f"`multipleOf` is too large: the least common multiple of all in a grammar, without "
            f"the decimal point, is at most {MAX_MULTIPLE}"
        )


def _check_repetitions(grammar: Grammar) -> None:
    """Raises GrammarError."""
    match grammar.kind:
        case GrammarKind.REGEX:
            found = nested(grammar.text)
        case GrammarKind.LARK:
            found = nested_in_lark(grammar.text)
        case _:
            found = 1
    if "attern" in grammar.text:  # every string of a schema may be one
        strings = re.findall(r'"(?:\\.|[^"\\])*"', grammar.text)
        found = max([found, *(nested(_unescaped(text)) for text in strings)])
    if found > MAX_NESTED:
        raise GrammarError(
            f"a pattern repeats what it repeats up to {found} times; {MAX_NESTED} is the most"
        )


def _unescaped(text: str) -> str:
    try:
        return msgspec.json.decode(text, type=str)
    except msgspec.DecodeError:  # a string of Lark
        return text[1:-1]


def _character(escape: "re.Match[str]") -> str:
    return chr(int(escape[1], 16))
