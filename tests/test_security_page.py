"""docs/security.md names tests that exist, and names one for each promise."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_a_test_that_is_named_exists(file: str, name: str) -> None:
    parsed = ast.parse((ROOT / file).read_text())
    assert name in {one.name for one in parsed.body if isinstance(one, ast.FunctionDef)} | {
        one.name for one in parsed.body if isinstance(one, ast.AsyncFunctionDef)
    }


def test_each_promise_has_its_test() -> None:
    promised = PAGE.partition("## What is promised")[2].partition("## What is decided")[0]
    rows = [line for line in promised.splitlines() if line.startswith("|")]
    promises = [row for row in rows if row not in ("| promise | test |", "|---|---|")]
    assert len(promises) > 25
    for row in promises:
        assert re.search(r"\| `tests/[\w/]+\.py::\w+` \|$", row), row
