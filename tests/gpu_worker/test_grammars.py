"""Rows with a grammar beside rows without one, in a worker on a tiny model of real tokens."""

import json
import os
import re
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from gpu_worker.grammars import Masks
from gpu_worker.worker import Worker
from pipeline.config import load_settings
from pipeline.grammars import source_of
from pipeline.messages import (
    GRAMMAR_GAVE_UP,
    CompileGrammar,
    Grammar,
    GrammarCompiled,
    GrammarKind,
    Logprobs,
    Sampling,
    Step,
)
from pipeline.model_folder import model_folder
from tests.end_to_end.tiny import make_model
from tests.gpu_worker.driving import Driver, ints, make_worker, prompt

VOCABULARY = 49152
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ok": {"type": "boolean"},
        "n": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["name", "ok", "n"],
    "additionalProperties": False,
}
JSON, CHOICE, REGEX, LARK, HARD = range(1, 6)
GRAMMARS = {
    JSON: Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
    CHOICE: Grammar(GrammarKind.CHOICE, '["yes, indeed", "no"]'),
    REGEX: Grammar(GrammarKind.REGEX, "[a-f]{3}-[0-9]{2,4}"),
    LARK: Grammar(GrammarKind.LARK, 'start: "(" start ")" | /[xyz]{2}/'),
    # it cannot end soon, and what may follow becomes more than a matcher looks for
    HARD: Grammar(GrammarKind.REGEX, "(.{0,90}a){20}"),
}
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.3, top_p=0.9, seed=11)
SHARP = Sampling(
    temperature=0.7, top_k=20, typical_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("words"), model_folder(load_settings()), hidden=32)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def answer(worker: Worker, *messages: CompileGrammar) -> list[GrammarCompiled]:
    """Compile, and wait for all answers."""
    for message in messages:
        worker.grammars.compile(message)
    answers: list[GrammarCompiled] = []
    deadline = time.monotonic() + 60
    while worker.grammars.is_compiling and time.monotonic() < deadline:
        answers += worker.grammars.compiled()
        os.sched_yield()
    return answers


@pytest.fixture(scope="module")
def worker(folder: Path) -> Worker:
    """It has compiled GRAMMARS."""
    made = make_worker(folder)
    known = [CompileGrammar(number, source_of(one)) for number, one in GRAMMARS.items()]
    assert answer(made, *known) == [GrammarCompiled(number) for number in GRAMMARS]
    return made


def eos_of(worker: Worker) -> frozenset[int]:
    return worker.grammars.eos_token_ids


def reply(worker: Worker, driver: Driver, row: int) -> list[int] | None:
    """What the row has produced before its end; None if it has not come to it."""
    produced = driver.rows[row].produced
    ends = [at for at, token in enumerate(produced) if token in eos_of(worker)]
    return produced[: ends[0]] if ends else None


def matches(number: int, text: str) -> bool:
    if number == JSON:
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    if number == CHOICE:
        return text in ("yes, indeed", "no")
    pattern = r"[a-f]{3}-[0-9]{2,4}" if number == REGEX else r"(\()*[xyz]{2}(\))*"
    return re.fullmatch(pattern, text) is not None and text.count("(") == text.count(")")


def until_ended(worker: Worker, driver: Driver, rows: list[int], steps: int = 200) -> None:
    driver.prefill_all(rows)
    for _ in range(steps):
        if all(reply(worker, driver, row) is not None for row in rows):
            return
        driver.step(decode=rows)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, SHARP], ids=["greedy", "drawn", "sharp"])
def test_each_row_follows_its_own_grammar_and_then_ends(
    worker: Worker, tokenizer: Tokenizer, sampling: Sampling
) -> None:
    driver = Driver(worker)
    numbers = {row: [JSON, CHOICE, REGEX, JSON, CHOICE, REGEX][row] for row in range(6)}
    for row, number in numbers.items():
        driver.add(row, prompt(row, 9), sampling=sampling, grammar_id=number)
    until_ended(worker, driver, list(numbers))
    for row, number in numbers.items():
        said = reply(worker, driver, row)
        assert said is not None
        assert matches(number, tokenizer.decode(said)), tokenizer.decode(said)


def test_rows_without_a_grammar_get_what_they_would_get_alone(worker: Worker, folder: Path) -> None:
    alone = Driver(make_worker(folder))
    mixed = Driver(worker)
    for driver in (alone, mixed):
        driver.add(1, prompt(1, 9), sampling=DRAWN)
        driver.add(3, prompt(3, 7), sampling=GREEDY)
    mixed.add(0, prompt(0, 9), sampling=DRAWN, grammar_id=JSON)
    mixed.add(2, prompt(2, 9), grammar_id=LARK)
    alone.generate([1, 3], 25)
    mixed.generate([0, 1, 2, 3], 25)
    assert mixed.rows[1].produced == alone.rows[1].produced
    assert mixed.rows[3].produced == alone.rows[3].produced


def test_steps_may_be_launched_before_their_predecessors_tokens_are_known(
    worker: Worker, folder: Path
) -> None:
    one_by_one = Driver(worker)
    one_by_one.add(0, prompt(0, 6), sampling=DRAWN, grammar_id=JSON)
    one_by_one.add(1, prompt(1, 6), sampling=DRAWN)
    one_by_one.generate([0, 1], 12)
    expected = [one_by_one.rows[row].produced for row in (0, 1)]

    ahead = Driver(worker)
    ahead.add(0, prompt(0, 6), sampling=DRAWN, grammar_id=JSON)
    ahead.add(1, prompt(1, 6), sampling=DRAWN)
    ahead.prefill_all([0, 1])
    blocks = list(range(100, 120))
    steps = [
        Step(
            step_id=n + 1,
            decode_rows=ints([0, 1]),
            block_rows=ints([0, 1] if (6 + n) % 4 == 0 else []),
            blocks=ints([blocks.pop(), blocks.pop()] if (6 + n) % 4 == 0 else []),
        )
        for n in range(11)
    ]
    launched = [worker.launch(step) for step in steps]
    worker.sample_launched(wait=True)
    found = np.array([np.frombuffer(one.result().token_ids, np.int32) for one in launched])
    for row in (0, 1):
        assert [*ahead.rows[row].produced, *found[:, row].tolist()] == expected[row]


def test_a_preempted_row_goes_on_where_its_reply_was(worker: Worker) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(5, 8), sampling=DRAWN, grammar_id=JSON)
    driver.generate([0], 20)
    whole = driver.rows[0].produced
    driver.free(0)

    driver.add(1, prompt(5, 8), sampling=DRAWN, grammar_id=JSON)
    driver.generate([1], 8)
    before = driver.free(1)
    resumed = driver.add(2, before.tokens, sampling=DRAWN, grammar_id=JSON, prompt_tokens=8)
    driver.generate([2], 12)
    assert resumed.produced == whole


def test_a_row_that_is_given_again_begins_its_grammar_anew_or_has_none(
    worker: Worker, tokenizer: Tokenizer
) -> None:
    driver = Driver(worker)
    for number in (CHOICE, REGEX, CHOICE, JSON, CHOICE):
        driver.add(0, prompt(number, 5), sampling=DRAWN, grammar_id=number)
        until_ended(worker, driver, [0])
        said = reply(worker, driver, 0)
        assert said is not None
        assert matches(number, tokenizer.decode(said))
        driver.free(0)
    free = driver.add(0, prompt(1, 9), sampling=DRAWN)
    driver.generate([0], 5)
    driver.free(0)
    again = driver.add(1, prompt(1, 9), sampling=DRAWN)
    driver.generate([1], 5)
    assert free.produced == again.produced


def test_a_matcher_that_gives_up_ends_its_own_row_alone(worker: Worker) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(0, 6), sampling=DRAWN, grammar_id=HARD)
    driver.add(1, prompt(1, 6), sampling=DRAWN, grammar_id=JSON)
    driver.prefill_all([0, 1])
    while GRAMMAR_GAVE_UP not in driver.rows[0].produced:
        driver.step(decode=[0, 1])
    assert min(driver.rows[1].produced) >= 0


def test_the_probability_that_is_told_is_the_models_own(worker: Worker) -> None:
    driver = Driver(worker)
    driver.add(0, prompt(2, 6), grammar_id=CHOICE, logprobs=Logprobs())
    driver.prefill_all([0])
    assert driver.rows[0].logprobs[0][0] < -5  # of 49152 tokens that are about as likely


def test_what_cannot_be_compiled_is_answered_with_a_sentence(worker: Worker) -> None:
    source = source_of(Grammar(GrammarKind.JSON_SCHEMA, '{"not": {}}'))
    (failed,) = answer(worker, CompileGrammar(77, source))
    assert failed.grammar_id == 77
    assert '"not"' in failed.error


def test_a_grammar_may_be_forgotten_when_no_row_has_it(worker: Worker) -> None:
    assert answer(worker, CompileGrammar(8, source_of(GRAMMARS[CHOICE]))) == [GrammarCompiled(8)]
    driver = Driver(worker)
    driver.add(0, prompt(0, 5), grammar_id=8)
    until_ended(worker, driver, [0])
    driver.free(0)
    source = source_of(GRAMMARS[REGEX])
    assert answer(worker, CompileGrammar(9, source, forget=(8,))) == [GrammarCompiled(9)]
    driver.add(0, prompt(0, 5), grammar_id=9)
    until_ended(worker, driver, [0])
    assert reply(worker, driver, 0) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [64, 90, 1000])
def test_a_mask_takes_what_its_bits_do_not_name_from_its_rows_alone(
    dtype: torch.dtype, vocabulary: int
) -> None:
    generator = np.random.default_rng(vocabulary)
    allowed = generator.random((2, vocabulary)) < 0.3
    octets = np.zeros((2, -(-vocabulary // 32) * 4), np.uint8)
    packed = np.packbits(allowed, axis=1, bitorder="little")
    octets[:, : packed.shape[1]] = packed
    masks = Masks(
        np.array([7, 3]), np.array([2, 0]), torch.from_numpy(octets.view(np.int32).copy())
    )
    logits = torch.randn(4, vocabulary).to(dtype)
    expected = logits.clone()
    expected[2][~torch.from_numpy(allowed[0])] = float("-inf")
    expected[0][~torch.from_numpy(allowed[1])] = float("-inf")
    before = logits.clone()
    assert torch.equal(masks.apply(logits), expected)
    assert torch.equal(logits, before)
