"""Messages survive the way from one process to another, and each inbox knows its own."""

import builtins
import functools
import types
import typing
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import messages
from pipeline.messages import (
    AdapterKey,
    Cancel,
    Message,
    Piece,
    Pieces,
    Prefetch,
    Shutdown,
    StepDone,
    ToAdapterLoader,
    ToFrontend,
    ToGpuWorker,
    Tokens,
    ToScheduler,
    ToTokenizerWorker,
    Value,
)

UNIONS = {
    "frontend": ToFrontend,
    "tokenizer_workers": ToTokenizerWorker,
    "scheduler": ToScheduler,
    "gpu_worker": ToGpuWorker,
    "adapter_loader": ToAdapterLoader,
}
MEMBERS = [(name, kind) for name, union in UNIONS.items() for kind in typing.get_args(union)]

PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    type(None): st.none(),
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=5),
    bytes: st.binary(max_size=5),
    Any: st.none() | st.booleans() | st.text(max_size=5),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field with this type."""
    arguments = typing.get_args(hint)
    match typing.get_origin(hint):
        case None if hint in PLAIN:
            return PLAIN[hint]
        case None if issubclass(hint, Enum):
            return st.sampled_from(hint)
        case None:
            return st.deferred(lambda: instances(hint))  # a key may hold keys
        case types.UnionType:
            return st.one_of([values(argument) for argument in arguments])
        case builtins.list:
            return st.lists(values(arguments[0]), max_size=3)
        case builtins.dict:
            return st.dictionaries(*map(values, arguments), max_size=3)
        case builtins.tuple if arguments[-1] is ...:
            return st.lists(values(arguments[0]), max_size=3).map(tuple)
        case builtins.tuple:
            return st.tuples(*map(values, arguments))
        case _:
            raise NotImplementedError(hint)


@functools.cache
def instances(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any instance of a message or of what messages are made of."""
    hints = typing.get_type_hints(kind)
    return st.builds(
        kind,
        **{field.name: values(hints[field.name]) for field in msgspec.structs.fields(kind)},
    )


def all_of(base: type[Any]) -> list[type[Any]]:
    found = [each for each in vars(messages).values() if isinstance(each, type)]
    return [each for each in found if issubclass(each, base) and each is not base]


@pytest.mark.parametrize(("name", "kind"), MEMBERS)
@given(data=st.data())
def test_each_inbox_decodes_each_message_that_is_for_it(
    name: str, kind: type[Message], data: st.DataObject
) -> None:
    message = data.draw(instances(kind))
    decoder = msgspec.msgpack.Decoder(UNIONS[name])
    assert decoder.decode(msgspec.msgpack.encode(message)) == message


@pytest.mark.parametrize(("name", "kind"), MEMBERS)
def test_a_message_of_another_inbox_is_refused(name: str, kind: type[Message]) -> None:
    decoder = msgspec.msgpack.Decoder(UNIONS[name])
    for stranger in set(all_of(Message)) - set(typing.get_args(UNIONS[name])):
        with pytest.raises(msgspec.ValidationError, match="Invalid value"):
            decoder.decode(msgspec.msgpack.encode([stranger.__name__]))


def test_every_message_is_for_some_inbox() -> None:
    assert {kind for _, kind in MEMBERS} == set(all_of(Message))


def test_the_first_line_of_each_message_says_which_way_it_goes() -> None:
    for kind in all_of(Message):
        first = (kind.__doc__ or "").partition("\n")[0]
        assert "->" in first or first.startswith("Downstream"), kind


def test_messages_cannot_be_changed() -> None:
    cancel = Cancel(1)
    with pytest.raises(AttributeError):
        cancel.request_id = 2  # type: ignore[misc]
    assert all(kind.__struct_config__.frozen for kind in (*all_of(Message), *all_of(Value)))


def test_an_adapter_key_is_the_same_key_after_its_way() -> None:
    key = AdapterKey("hub", "org/sql", "abc", "scope")
    sent = msgspec.msgpack.encode(Prefetch(key))
    arrived = msgspec.msgpack.decode(sent, type=Prefetch).adapter
    assert {key: 1}[arrived] == 1
    assert sorted([AdapterKey("local", "a"), key]) == [key, AdapterKey("local", "a")]
    assert len({key, AdapterKey("hub", "org/sql", "abc"), AdapterKey("hub", "org/sql")}) == 3


def test_a_field_that_an_older_sender_does_not_know_has_its_default() -> None:
    decoder = msgspec.msgpack.Decoder(UNIONS["scheduler"])
    assert decoder.decode(msgspec.msgpack.encode(["Shutdown", "frontend"])) == Shutdown("frontend")


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n, k in MEMBERS if messages.SECRET & set(k.__struct_fields__)]
)
def test_the_text_of_a_message_does_not_show_its_secrets(name: str, kind: type[Message]) -> None:
    given = {field: "hf_secret" for field in kind.__struct_fields__ if field in messages.SECRET}
    others = {field: 7 for field in kind.__struct_fields__ if field not in given}
    text = repr(kind(**given, **others))
    assert "hf_secret" not in text
    assert all(f"{field}=7" in text for field in others)


def test_a_step_that_brings_tokens_alone_has_one_empty_field_for_each_other_kind() -> None:
    """Every step pays for each byte: of log-probabilities and embeddings there are no more."""
    done = msgspec.msgpack.encode(StepDone(1, b"1234"))
    assert done == b"\x96\xa8StepDone\x01\xc4\x041234\xc4\x00\x00\xc4\x00"
    tokens = msgspec.msgpack.encode(Tokens([1], [2], {}))
    assert tokens == b"\x95\xa6Tokens\x91\x01\x91\x02\x80\x90"
    assert len(msgspec.msgpack.encode(Piece(1, "a"))) == 7
    assert len(msgspec.msgpack.encode(Pieces([]))) == 1 + 7 + 2
