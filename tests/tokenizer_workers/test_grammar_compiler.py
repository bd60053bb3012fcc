"""The process that compiles grammars: it answers, and is killed when it takes too long."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from llguidance import LLMatcher

from pipeline.grammars import GrammarError, compile_grammar, load_vocabulary
from pipeline.model_config import read_model_config
from tokenizer_workers.grammar_compiler import Compiler, probe

GOOD = LLMatcher.grammar_from_regex("abc")
ENDLESS = LLMatcher.grammar_from_regex("((a{30,1000}){30,1000}){30,1000}")


@pytest.fixture(scope="module")
def compiler(folder: Path) -> Iterator[Compiler]:
    made = Compiler(folder, read_model_config(folder), seconds=2)
    yield made
    made.close()


def test_a_good_grammar_has_no_error_and_a_bad_one_has(compiler: Compiler) -> None:
    assert compiler.error_of(GOOD) == ""
    assert '"not"' in compiler.error_of(LLMatcher.grammar_from_json_schema('{"not": {}}'))
    assert compiler.error_of(GOOD) == ""


def test_one_that_takes_too_long_is_refused_and_the_next_is_compiled(compiler: Compiler) -> None:
    assert "too complex" in compiler.error_of(ENDLESS)
    assert compiler.error_of(GOOD) == ""


def test_a_model_that_grammars_cannot_be_used_with_says_so(folder: Path, tmp_path: Path) -> None:
    config = read_model_config(folder)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {}}}')
    compiler = Compiler(tmp_path, config, seconds=2)
    assert "tokenizer cannot be used" in compiler.error_of(GOOD)


def test_a_grammar_is_tried(folder: Path) -> None:
    config = read_model_config(folder)
    vocabulary = load_vocabulary(folder, eos_token_ids=config.eos_token_ids, size=config.vocabulary)
    for regex in ("a?", "[a-z]{30}", "(a|b)*"):
        probe(compile_grammar(vocabulary, LLMatcher.grammar_from_regex(regex)), seed=1)
    letters = compile_grammar(vocabulary, LLMatcher.grammar_from_regex("[a-z]{30}"))
    with pytest.raises(GrammarError, match="takes too long"):
        probe(letters, seed=1, step_seconds=0)
