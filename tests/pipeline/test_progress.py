"""Progress of long work, off a terminal."""

import pytest

from pipeline.progress import progress


def test_a_line_for_each_tenth_and_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress("loading weights", 30, "layer") as shown:
        for _ in range(30):
            shown.update(1)
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "loading weights: 100%"
    assert not set(said) & set("\r\x1b")
