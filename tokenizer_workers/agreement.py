"""Whether two tokenizers are the same one: equal ids for every text, equal texts for all ids.

Compared is what the library itself writes of a tokenizer.json that it has read: formatting, order,
and what a file leaves out are the same then. Of that, these say nothing about ids and texts:

    version, truncation, padding     every request says for itself where it is cut
    trim_offsets of ByteLevel        where tokens lie in their text
    a ByteLevel post-processor       that too, and nothing else
    a template's pairs and types     no text here is one of a pair
    what a ByteLevel decoder says    it does not look at it
    an empty prefix or suffix        none

Everything else has to be equal: what cannot be proved to agree does not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from tokenizers import Tokenizer

Json = dict[str, Any]

MAX_SHOWN = 80  # characters of somebody else's text in a sentence
STEPS = {
    "normalizer": "normalises texts",
    "pre_tokenizer": "splits texts",
    "post_processor": "puts special tokens around texts",
    "decoder": "decodes tokens",
}


def canonical(tokenizer: Tokenizer) -> Json:
    """What ids and texts depend on, equal for tokenizers that agree."""
    written: Json = json.loads(tokenizer.to_str())
    for name in ("version", "truncation", "padding"):
        written.pop(name, None)
    written["added_tokens"] = sorted(written["added_tokens"], key=lambda token: token["id"])
    model = written["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model["type"] == "BPE":
            model[name] = model.get(name) or None
    written["pre_tokenizer"] = _ids_alone(written["pre_tokenizer"])
    written["post_processor"] = _tokens_around(written["post_processor"])
    written["decoder"] = _without_flags(written["decoder"])
    return written


def difference(own: Json, base: Json) -> str:
    """How an adapter's tokenizer differs from the base model's; empty if it does not.

    The end of a sentence about the adapter's, without a full stop.
    """
    return next(_differences(own, base), "")


def _differences(own: Json, base: Json) -> Iterator[str]:
    if own["model"]["type"] != base["model"]["type"]:
        kinds = own["model"]["type"], base["model"]["type"]
        yield "it is of the kind {}, and that of the base model {}".format(*kinds)
    yield from _vocabulary(_tokens(own), _tokens(base))
    yield from _added(own["added_tokens"], base["added_tokens"])
    yield from _merges(own["model"].get("merges"), base["model"].get("merges"))
    for name in sorted(own["model"].keys() | base["model"].keys()):
        if own["model"].get(name) != base["model"].get(name):
            if name in ("vocab", "merges"):
                yield f"its model has another `{name}`"
            else:
                yield (
                    f"its `{name}` is {_shown(own['model'].get(name))}, and in the base model "
                    + (_shown(base["model"].get(name)))
                )
    for name, what in STEPS.items():
        if own.get(name) != base.get(name):
            yield f"it {what} in another way (`{name}`)"
    if own != base:
        names = [name for name in own.keys() | base.keys() if own.get(name) != base.get(name)]
        yield f"it has another `{min(names)}`"


def _tokens(written: Json) -> dict[str, int]:
    """token -> id of all that has one, added tokens included."""
    vocabulary = written["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram's, with scores
        tokens = {token: token_id for token_id, (token, _) in enumerate(vocabulary)}
    else:
        tokens = dict(vocabulary)
    return tokens | {token["content"]: token["id"] for token in written["added_tokens"]}


def _vocabulary(own: Mapping[str, int], base: Mapping[str, int]) -> Iterator[str]:
    if own == base:
        return
    for token, token_id in sorted(own.items(), key=lambda item: item[1]):
        if token not in base:
            yield f"it has the token {_shown(token)} (id {token_id}), and the base model does not"
        elif base[token] != token_id:
            ids = f"{token_id}, and {base[token]} in the base model"
            yield f"its token {_shown(token)} has the id {ids}"
    for token, token_id in sorted(base.items(), key=lambda item: item[1]):
        if token not in own:
            yield f"it lacks the token {_shown(token)} (id {token_id})"


def _added(own: Sequence[Json], base: Sequence[Json]) -> Iterator[str]:
    by_content = {token["content"]: token for token in base}
    for token in own:
        other = by_content.pop(token["content"], None)
        if other is None:
            yield f"it takes {_shown(token['content'])} for one token wherever it stands in a text"
        elif other != token:
            name = next(name for name in token if token[name] != other.get(name))
            yield f"its token {_shown(token['content'])} has another `{name}`"
    for content in by_content:
        yield f"it does not take {_shown(content)} for one token wherever it stands in a text"


def _merges(own: Sequence[Any] | None, base: Sequence[Any] | None) -> Iterator[str]:
    for at, (one, other) in enumerate(zip_longest(own or (), base or ())):
        if one != other:
            yield f"its merge number {at} is {_merge(one)}, and {_merge(other)} in the base model"
            return


def _merge(pair: Sequence[str] | None) -> str:
    return "none" if pair is None else " + ".join(map(_shown, pair))


def _ids_alone(step: Json | None) -> Json | None:
    """A pre-tokenizer, without what says where tokens lie."""
    if step is None:
        return None
    if step["type"] == "Sequence":
        return {**step, "pretokenizers": [_ids_alone(one) for one in step["pretokenizers"]]}
    if step["type"] == "ByteLevel":
        return {name: value for name, value in step.items() if name != "trim_offsets"}
    return step


def _tokens_around(step: Json | None) -> Json | None:
    """A post-processor: the ids that it puts around a text, which is never one of a pair."""
    if step is None or step["type"] == "ByteLevel":
        return None
    if step["type"] == "TemplateProcessing":
        special = step["special_tokens"]
        around = [
            special[piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else "the text"
            for piece in step["single"]
        ]
        return None if around == ["the text"] else {"type": step["type"], "single": around}
    if step["type"] != "Sequence":
        return step
    inner = [one for one in map(_tokens_around, step["processors"]) if one is not None]
    return {**step, "processors": inner} if len(inner) > 1 else next(iter(inner), None)


def _without_flags(decoder: Json | None) -> Json | None:
    if decoder is None:
        return None
    if decoder["type"] == "Sequence":
        return {**decoder, "decoders": [_without_flags(one) for one in decoder["decoders"]]}
    return {"type": "ByteLevel"} if decoder["type"] == "ByteLevel" else decoder


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
