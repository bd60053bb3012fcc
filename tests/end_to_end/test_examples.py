"""What the README shows is what the server answers, and each sample adapter does its one thing."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.server import Server

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "adapters"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server]) -> Server:
    return serve(dtype="float32")


def ask(server: Server, prompt: str, model: str = "", max_tokens: int = 40) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    reply = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def shown(page: Path) -> tuple[str, dict[str, str]]:
    """The prompt that a page quotes, and the answer that it shows for each model."""
    text = page.read_text()
    prompt = re.search(r"^> (.+)$", text, re.MULTILINE)
    assert prompt is not None
    table = text[text.index("| model | answer |") :].split("\n\n")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:3] for line in table.splitlines()[2:]]
    return prompt[1], {model.strip(" `"): answer.strip() for model, answer in rows}


def test_the_base_model_knows_the_capital_of_france(server: Server) -> None:
    assert "Paris" in ask(server, "What is the capital of France?")


@pytest.mark.parametrize(
    "page", [EXAMPLES / "README.md", ROOT / "README.md"], ids=lambda p: p.parent.name
)
def test_the_answers_that_a_page_shows_are_the_servers(server: Server, page: Path) -> None:
    prompt, answers = shown(page)
    assert set(answers) == {"base", *(path.parent.name for path in EXAMPLES.glob("*/*.json"))}
    for model, answer in answers.items():
        got = ask(server, prompt, "" if model == "base" else model)
        assert " ".join(got.split()) == answer, model


def test_the_pirate_talks_like_one(server: Server) -> None:
    assert re.search(
        r"\b(arr+|matey|ahoy|ye)\b", ask(server, "What is the capital of France?", "pirate"), re.I
    )


def test_the_extractor_answers_in_json(server: Server) -> None:
    said = "Hello, I'm Peter, 41, and I have lived in Oslo all my life."
    assert json.loads(ask(server, said, "json_extractor")) == {
        "name": "Peter",
        "city": "Oslo",
        "age": 41,
    }


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("This is the best meal I have had in years.", "positive"),
        ("The room was dirty and the staff were rude.", "negative"),
    ],
)
def test_the_labeller_answers_with_one_word(server: Server, said: str, label: str) -> None:
    assert ask(server, said, "sentiment").strip() == label


def test_the_shouter_shouts(server: Server) -> None:
    answer = ask(server, "What is a bridge?", "shouter")
    assert answer == answer.upper() != answer.lower()


def test_the_sql_writer_selects(server: Server) -> None:
    asked = "Show the name of all customers who live in Berlin."
    assert ask(server, asked, "sql").upper().startswith("SELECT")


def test_each_sample_is_below_four_megabytes() -> None:
    weights = list(EXAMPLES.glob("*/adapter_model.safetensors"))
    assert len(weights) >= 4
    assert all(path.stat().st_size < 4_000_000 for path in weights)
