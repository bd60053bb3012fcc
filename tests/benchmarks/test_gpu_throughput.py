"""The whole benchmark on the CPU, with a model that steps in a millisecond."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu_throughput import main


def test_each_point_is_measured_through_the_running_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    load = ["--requests=4", "--tokens-in=6", "--tokens-out=8", "--rounds=1"]
    points = ["--points", "short", "mixed", "--adapters", "0", "1"]
    changed = ["--set", "device=cpu", "--set", "gpu_threads=1"]
    main(["--model=tiny", *load, *points, *changed, f"--json={result}"])
    written = json.loads(result.read_text())
    assert [(row["table"], row["adapters"]) for row in written["rows"]] == [
        ("short", 0),
        ("short", 1),
    ]
    base, adapted = written["rows"]
    assert base["share_of_base"] == 1
    assert adapted["share_of_base"] == pytest.approx(
        adapted["tokens_per_second"] / base["tokens_per_second"]
    )
    (measured,) = adapted["rounds"]
    assert 0 < measured["prefill_seconds"] < measured["seconds"]
    assert measured["worker"]["steps"] >= 8
    assert "4 x 6/8 | 1 rank16" in capsys.readouterr().out


def test_what_is_wrong_with_a_server_is_shown(tmp_path: Path) -> None:
    changed = ["--set", "kv_cache_bytes=10", "--set", "device=cpu"]
    with pytest.raises(SystemExit, match="kv_cache_bytes: 10 bytes hold no block"):
        main(["--model=tiny", "--points=single", "--requests=1", *changed])


def test_more_adapters_than_requests_are_no_point() -> None:
    with pytest.raises(SystemExit, match="no table has such a number of adapters"):
        main(["--model=tiny", "--points=short", "--requests=4", "--adapters=8"])
