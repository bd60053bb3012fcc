"""Replies that call tools match a grammar where they have to, in each format."""

import json
from typing import Any

import pytest
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.grammars import GrammarError, compile_grammar, source_of
from pipeline.messages import Grammar, GrammarKind, ToolChoice, Tools
from tokenizer_workers.tool_calls import ToolCallParser
from tokenizer_workers.tool_formats import FORMATS
from tokenizer_workers.tool_grammars import tool_grammar

END = "<|end|>"
ADD: dict[str, Any] = {
    "name": "add",
    "parameters": {
        "type": "object",
        "$defs": {"number": {"type": "integer"}},
        "properties": {"a": {"$ref": "#/$defs/number"}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
STRICT = {**ADD, "strict": True}
NOW: dict[str, Any] = {"name": "now"}


def make_tokenizer(*, has_tokens: bool) -> Tokenizer:
    """With tokens for what is around calls, or without."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(['hello {"name": "arguments"}'] * 5, trainer)
    tokenizer.add_special_tokens([END])
    if has_tokens:
        tokenizer.add_tokens([AddedToken("<tool_call>"), AddedToken("</tool_call>")])
        tokenizer.add_special_tokens(["[TOOL_CALLS]", "<|python_tag|>"])
    return tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["own tokens", "plain text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(has_tokens=request.param)


def accepts(
    tokenizer: Tokenizer, form: str, tools: Tools, text: str, content: Grammar | None = None
) -> bool:
    """Whether the grammar allows this reply, to its end."""
    eos = tokenizer.token_to_id(END)
    assert eos is not None
    vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=[eos])
    grammar = tool_grammar(FORMATS[form], tools, content=content, token_id=tokenizer.token_to_id)
    assert grammar is not None
    matcher = compile_grammar(vocabulary, source_of(grammar))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def call(form: str, name: str = "add", **arguments: Any) -> str:
    how = FORMATS[form]
    written = json.dumps({"name": name, how.arguments[0]: arguments})
    if how.is_list:
        return f"{how.begin}[{written}]"
    return f"{how.begin}\n{written}\n{how.end}" if how.end else written


@pytest.mark.parametrize("form", FORMATS)
def test_a_forced_call_is_one_of_the_tools_with_its_own_arguments(
    tokenizer: Tokenizer, form: str
) -> None:
    tools = Tools([ADD, NOW], ToolChoice.REQUIRED)
    assert accepts(tokenizer, form, tools, call(form, a=1))
    assert accepts(tokenizer, form, tools, call(form, "now"))
    assert not accepts(tokenizer, form, tools, call(form, a="one"))
    assert not accepts(tokenizer, form, tools, call(form))
    assert not accepts(tokenizer, form, tools, call(form, "now", a=1))
    assert not accepts(tokenizer, form, tools, call(form, "other"))
    assert not accepts(tokenizer, form, tools, "hello")
    assert not accepts(tokenizer, form, tools, "")


@pytest.mark.parametrize("form", FORMATS)
def test_a_named_tool_is_the_only_one(tokenizer: Tokenizer, form: str) -> None:
    tools = Tools([ADD, NOW], ToolChoice.REQUIRED, only="add", parallel=False)
    assert accepts(tokenizer, form, tools, call(form, a=1))
    assert not accepts(tokenizer, form, tools, call(form, "now"))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_several_calls_are_allowed_unless_told_otherwise(
    tokenizer: Tokenizer, form: str, parallel: bool
) -> None:
    tools = Tools([ADD], ToolChoice.REQUIRED, parallel=parallel)
    one = call(form, a=1)
    inner = one.removeprefix("[TOOL_CALLS][").removesuffix("]")
    two = f"[TOOL_CALLS][{inner}, {inner}]" if FORMATS[form].is_list else one
    two = two if FORMATS[form].is_list else FORMATS[form].between.join([one, one])
    assert accepts(tokenizer, form, tools, two) is parallel
    parser = ToolCallParser(FORMATS[form], names=["add"])
    assert [part.index for part in parser.push(two).parts if part.name] == [0, 1]


@pytest.mark.parametrize("form", FORMATS)
def test_strict_tools_may_be_called_or_not_but_not_wrongly(tokenizer: Tokenizer, form: str) -> None:
    tools = Tools([STRICT, NOW])
    assert accepts(tokenizer, form, tools, "hello there")
    assert accepts(tokenizer, form, tools, "")
    assert accepts(tokenizer, form, tools, call(form, a=1))
    assert accepts(tokenizer, form, tools, call(form, "now", any=[1]))
    assert not accepts(tokenizer, form, tools, call(form, a="one"))
    if not FORMATS[form].is_bare:
        assert accepts(tokenizer, form, tools, "So: " + call(form, a=1))
        assert not accepts(tokenizer, form, tools, "So: " + call(form, a="one"))


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_call_matches_the_response_format(tokenizer: Tokenizer, form: str) -> None:
    content = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "integer"}}')
    tools = Tools([ADD])
    assert accepts(tokenizer, form, tools, "[1, 2]", content)
    assert accepts(tokenizer, form, tools, call(form, a=1), content)
    assert not accepts(tokenizer, form, tools, "hello", content)


def test_without_need_there_is_no_grammar() -> None:
    form = FORMATS["hermes"]
    content = Grammar(GrammarKind.REGEX, "a")
    assert tool_grammar(form, Tools([ADD]), content=None, token_id=lambda _: None) is None
    chosen = Tools([STRICT], ToolChoice.NONE)
    assert tool_grammar(form, chosen, content=None, token_id=lambda _: None) is None
    assert tool_grammar(form, chosen, content=content, token_id=lambda _: None) is content


def test_a_schema_that_cannot_be_enforced_is_named(tokenizer: Tokenizer) -> None:
    tools = Tools([{"name": "f", "parameters": {"not": {}}}], ToolChoice.REQUIRED)
    with pytest.raises(GrammarError, match="not"):
        accepts(tokenizer, "hermes", tools, "")
