"""When two tokenizer.json agree: formatting does not count, whatever changes ids or texts does."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from tests.tokenizer_workers.tokenizers_for_tests import (
    sentencepiece_like,
    with_added_tokens,
    word_pieces,
)
from tokenizer_workers.agreement import canonical, difference
from tokenizer_workers.compare import compare
from tokenizer_workers.loading import read_tokenizer

Json = dict[str, Any]
KINDS = {"pieces": sentencepiece_like, "words": word_pieces}


def written(tokenizer: Tokenizer) -> Json:
    file: Json = json.loads(tokenizer.to_str())
    return file


def differs(own: Tokenizer | Json, base: Tokenizer) -> str:
    read = own if isinstance(own, Tokenizer) else Tokenizer.from_str(json.dumps(own))
    return difference(canonical(read), canonical(base))


def shuffled(value: Any, draw: random.Random) -> Any:
    """With the members of objects in another order."""
    if isinstance(value, dict):
        items = list(value.items())
        if "type" not in value:  # which the library wants first in some places
            draw.shuffle(items)
        return {name: shuffled(inner, draw) for name, inner in items}
    return [shuffled(inner, draw) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 1 << 30), indent=st.sampled_from([None, 1, 4]), ascii=st.booleans())
def test_formatting_order_and_what_is_cut_do_not_count(
    kind: str, seed: int, indent: int | None, ascii: bool
) -> None:
    base = with_added_tokens(KINDS[kind]())
    file = shuffled(written(base), random.Random(seed))
    text = json.dumps(file, indent=indent, ensure_ascii=ascii)
    own = Tokenizer.from_str(text)
    own.enable_truncation(7)
    own.enable_padding(length=9, pad_token="cat", pad_id=1)
    assert differs(own, base) == ""


def test_merges_are_the_same_in_their_older_form_and_with_what_a_file_leaves_out() -> None:
    base = sentencepiece_like()
    file = written(base)
    file["model"]["merges"] = [" ".join(pair) for pair in file["model"]["merges"]]
    for name in ("ignore_merges", "dropout", "end_of_word_suffix"):
        del file["model"][name]
    file["model"]["continuing_subword_prefix"] = ""
    assert differs(file, base) == ""


def test_what_says_only_where_tokens_lie_does_not_count(tokenizer: Tokenizer) -> None:
    own = Tokenizer.from_str(tokenizer.to_str())
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False),
        ]
    )
    own.post_processor = processors.ByteLevel(trim_offsets=False)
    file = written(own)
    file["decoder"] = {**file["decoder"], "add_prefix_space": False, "use_regex": False}
    assert file != written(tokenizer)
    assert differs(file, tokenizer) == ""


def rename(file: Json) -> str:
    vocabulary = file["model"]["vocab"]
    vocabulary["dog"] = vocabulary.pop("cat")
    return "has the token 'dog'"


def swap(file: Json) -> str:
    vocabulary = file["model"]["vocab"]
    vocabulary["cat"], vocabulary["é"] = vocabulary["é"], vocabulary["cat"]
    return "its token 'cat' has the id" if vocabulary["cat"] < vocabulary["é"] else "'\\xe9'"


def lose(file: Json) -> str:
    vocabulary = file["model"]["vocab"]
    del vocabulary[max(vocabulary, key=vocabulary.__getitem__)]
    return "its token '<tool call \\xe9>' has the id"  # the next free one, now


def normalise(file: Json) -> str:
    file["normalizer"] = json.loads(normalizers.NFC().__getstate__())
    return "`normalizer`"


def split(file: Json) -> str:
    file["pre_tokenizer"] = {"type": "Punctuation", "behavior": "Isolated"}
    return "`pre_tokenizer`"


def decode(file: Json) -> str:
    file["decoder"] = {"type": "Fuse"}
    return "`decoder`"


def put_around(file: Json) -> str:
    token, token_id = file["added_tokens"][0]["content"], file["added_tokens"][0]["id"]
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
    return "`post_processor`"


def strip(file: Json) -> str:
    file["added_tokens"][0]["lstrip"] = True
    return "has another `lstrip`"


def show(file: Json) -> str:
    file["added_tokens"][0]["special"] = False
    return "has another `special`"


CHANGES: tuple[Callable[[Json], str], ...] = (
    rename,
    swap,
    lose,
    normalise,
    split,
    decode,
    put_around,
    strip,
    show,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_ids_or_texts_is_named(kind: str, change: Callable[[Json], str]) -> None:
    base = with_added_tokens(KINDS[kind]())
    file = written(base)
    words = change(file)
    sentence = differs(file, base)
    assert words in sentence
    assert sentence == differs(file, base), "the same each time"


def test_another_order_of_merges_is_named() -> None:
    base = sentencepiece_like()
    file = written(base)
    file["model"]["merges"].reverse()
    assert "its merge number 0 is '\\u2581' + '\\u2581', and" in differs(file, base)
    file["model"]["merges"].pop()
    assert "its merge number" in differs(file, base)


def test_another_flag_of_the_model_is_named() -> None:
    base = sentencepiece_like()
    file = written(base)
    file["model"]["byte_fallback"] = False
    assert differs(file, base) == "its `byte_fallback` is False, and in the base model True"


def test_a_token_that_was_added_is_named() -> None:
    base, own = sentencepiece_like(), sentencepiece_like()
    own.add_special_tokens([AddedToken("<pad>")])
    assert "has the token '<pad>'" in differs(own, base)
    assert "it lacks the token '<pad>'" in differs(base, own)
    own = sentencepiece_like()
    own.add_tokens(["cat"])  # which has an id
    assert "it takes 'cat' for one token" in differs(own, base)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="the cat s!.é日<>/▁sHelo ", max_size=30), max_size=5),
    seed=st.integers(0, 99),
)
def test_what_agrees_encodes_and_decodes_alike_and_what_encodes_otherwise_disagrees(
    texts: list[str], seed: int
) -> None:
    """The one direction is the promise; the other is what the promise is worth."""
    draw = random.Random(seed)
    base = with_added_tokens(sentencepiece_like())
    file = written(base)
    for change in draw.sample(CHANGES, draw.randrange(2)):
        change(file)
    own = Tokenizer.from_str(json.dumps(file))
    alike = all(
        (ids := base.encode(text).ids) == own.encode(text).ids
        and own.decode(ids) == base.decode(ids)
        and own.decode(ids, skip_special_tokens=False)
        == base.decode(ids, skip_special_tokens=False)
        for text in texts
    )
    assert alike or differs(own, base)


def test_the_process_compares_with_the_folder_of_the_base_model(
    folder: Path, tokenizer: Tokenizer
) -> None:
    file = (folder / "tokenizer.json").read_bytes()
    assert compare(folder, file) == ""
    assert compare(folder, tokenizer.to_str(pretty=True).encode()) == ""
    changed = json.loads(file)
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    assert "its merge number" in compare(folder, json.dumps(changed).encode())
    assert compare(folder, b"<html>").startswith("it cannot be read (expected value")
    assert compare(folder, b"\xff").startswith("it cannot be read")
    assert compare(folder, b"").startswith("it cannot be read")


def test_a_copy_that_names_special_tokens_as_the_folder_does_agrees(tmp_path: Path) -> None:
    """A library that reads a folder and writes it again marks what tokenizer_config.json names."""
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "cat"}))
    marked = read_tokenizer(tmp_path, {"eos_token": "cat"})
    assert differs(marked, sentencepiece_like())
    assert compare(tmp_path, marked.to_str().encode()) == ""
    assert compare(tmp_path, (tmp_path / "tokenizer.json").read_bytes()) == ""
