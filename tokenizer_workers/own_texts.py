"""What an adapter ships for tokenizers beside its weights, and what the base model makes of it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec

from tokenizer_workers.chat_template import find_source, special_tokens

MAX_SHOWN = 80  # characters of somebody else's text in a sentence


class OwnTexts(msgspec.Struct, frozen=True):
    """Of one adapter, or of a merge whose parts have them in common.

    special_tokens  variables of the template: the adapter's, and the base model's where it says
                    nothing of them
    eos             an id that ends its replies, besides those of the base model
    problem         why no request is served, as the end of a sentence about the adapter
    """

    template: str = ""
    special_tokens: dict[str, str] = {}
    eos: int | None = None
    problem: str = ""

    @property
    def characters(self) -> int:
        """How large it is, about."""
        return len(self.template) + len(self.problem) + sum(map(len, self.special_tokens.values()))


NOTHING = OwnTexts()


class BaseTexts(msgspec.Struct, frozen=True):
    """What adapters' files are compared with.

    config       its tokenizer_config.json
    id_of        of a token, added ones included; None if it has none
    special      those that are special, however they came to be
    eos_ids      that end replies
    around       the ids that it puts before and behind a text
    """

    config: Mapping[str, Any]
    id_of: Callable[[str], int | None]
    special: Collection[str]
    eos_ids: Collection[int]
    around: tuple[tuple[int, ...], tuple[int, ...]]


class _Malformed(Exception):
    """A file that is not what its name says; the text is the end of a sentence."""


class _Disagrees(Exception):
    """A file that says something else than the base model; the text is the end of a sentence."""


def read_own_texts(files: Mapping[str, bytes], base: BaseTexts) -> OwnTexts:
    """By name, without tokenizer.json, which is compared elsewhere."""
    if not files:
        return NOTHING
    try:
        config = _json(files, "tokenizer_config.json")
        named = _json(files, "special_tokens_map.json") | config
        template = _template(files, config)
        _check_ids("added_tokens.json", _json(files, "added_tokens.json").items(), base)
        _check_ids("tokenizer_config.json", _added(config), base)
        _check_named(named, base)
        _check_around(config, base)
    except _Malformed as error:
        return OwnTexts(problem=f"its {error}")
    except _Disagrees as error:
        return OwnTexts(problem=disagreement(str(error)))
    own = special_tokens(named)
    theirs = special_tokens(base.config).items()
    inherited = {name: text for name, text in theirs if name not in named}  # null is none
    eos = base.id_of(own.get("eos_token", ""))
    return OwnTexts(
        template=template,
        special_tokens=inherited | own if template else {},
        eos=None if eos in base.eos_ids else eos,
    )


def disagreement(difference: str) -> str:
    """A problem, as the end of a sentence.

    difference  what a file says, with the file's name in front
    """
    return (
        f"its {difference}; train it with the base model's tokenizer, or take its tokenizer files "
        "away to have it served with that"
    )


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        return msgspec.json.decode(files[name], type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Malformed(f"{name} is not a JSON object") from error


def _template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    jinja_file = files.get("chat_template.jinja")
    try:
        text = None if jinja_file is None else jinja_file.decode()
        found = find_source(config, text)
    except UnicodeDecodeError as error:
        raise _Malformed("chat_template.jinja is not text in UTF-8") from error
    except (KeyError, TypeError) as error:
        raise _Malformed("tokenizer_config.json has a `chat_template` that is none") from error
    if found is not None and not isinstance(found, str):
        raise _Malformed("tokenizer_config.json has a `chat_template` that is none")
    return found or ""


def _added(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """token, id of those that tokenizer_config.json lists by id."""
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise _Malformed("tokenizer_config.json has an `added_tokens_decoder` that is no object")
    for text, token in listed.items():
        if not text.isdecimal() or not isinstance(token, dict):
            raise _Malformed("tokenizer_config.json has an `added_tokens_decoder` that is none")
        yield str(token.get("content")), int(text)


def _check_ids(name: str, tokens: Any, base: BaseTexts) -> None:
    base_listed = dict(_added(base.config))
    for token, token_id in tokens:
        own = base.id_of(token)
        theirs = base_listed.get(token) if own is None else own
        if theirs is None:
            raise _Disagrees(
                f"{name} adds the token {_shown(token)}, which the base model does not have"
            )
        if token_id not in (theirs, base_listed.get(token)):
            raise _Disagrees(
                f"{name} gives the token {_shown(token)} the id {_shown(token_id)}, and "
                f"{theirs} is the base model's"
            )


def _check_named(named: Mapping[str, Any], base: BaseTexts) -> None:
    """Special tokens are so in the base model, too: they are found in any text."""
    theirs = set(base.special).union(text for _, text in _named(base.config))
    for name, text in _named(named):
        if text not in theirs:
            raise _Disagrees(
                f"tokenizer files name {_shown(text)} as `{name}`, which is no special token of "
                "the base model"
            )


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """name, text of all special tokens that a file names."""
    yield from special_tokens(config).items()
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(name)
        if isinstance(listed, dict):
            listed = list(listed.values())
        for token in listed if isinstance(listed, list) else ():
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                yield name, text


def _check_around(config: Mapping[str, Any], base: BaseTexts) -> None:
    """`add_bos_token` and `add_eos_token` say what the base model says, or what it does."""
    before, behind = base.around
    for name, of, ids in (
        ("add_bos_token", "bos_token", before),
        ("add_eos_token", "eos_token", behind),
    ):
        says = config.get(name)
        does = base.id_of(special_tokens(base.config).get(of, "")) in ids
        if says is not None and says not in (does, base.config.get(name)):
            raise _Disagrees(
                f"tokenizer_config.json says {_shown(says)} for `{name}`, and the base model's "
                f"tokenizer {'puts' if does else 'does not put'} that token there"
            )


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
