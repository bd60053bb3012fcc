"""The whole benchmark on the CPU: each tier is where the tables say."""

import json
from typing import Any

import pytest

from benchmarks.gpu_adapters import Tiers, main, popularity

SMALL = [
    *("--model=tiny", "--pool=8", "--counts", "1", "20", "--distinct=20"),
    *("--in-flight=8", "--rows=4", "--ends=60", "--tokens-in=8", "--tokens-out=4"),
    *("--streams=3", "--stream-tokens=100", "--host-rate=50", "--file-rate=50"),
    *("--set", "device=cpu", "--set", "gpu_threads=1", "--set", "stats_seconds=0.02"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("results") / "result.json"
    main([*SMALL, f"--json={path}", f"--folder={path.parent}"])
    assert list(path.parent.iterdir()) == [path]  # all else went
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


def part(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["part"] == name]


def test_requests_over_more_adapters_than_fit_are_all_served(rows: list[dict[str, Any]]) -> None:
    measured = part(rows, "throughput")
    assert [(row["adapters"], row["popularity"]) for row in measured] == [
        (1, "uniform"),
        (20, "uniform"),
        (20, "power law"),
    ]
    assert all(row["tokens_per_second"] > 0 for row in measured)
    assert measured[0]["copies"] == 0
    assert measured[1]["copies"] > 0


def test_each_tier_is_asked_for_what_lies_in_it(rows: list[dict[str, Any]]) -> None:
    found = [(row["tier"], row["reads"], row["copies"]) for row in part(rows, "first_token")]
    assert found == [
        ("base model", 0, 0),
        ("resident", 0, 0),
        ("resident", 0, 0),
        ("host arena", 0, 2),
        ("page cache", 2, 2),
        ("disk", 2, 2),
    ]


def test_streams_run_beside_loads_and_without(rows: list[dict[str, Any]]) -> None:
    quiet, requests, host, asked_host, files, asked_files, again = part(rows, "gaps")
    assert [row["copies"] for row in (quiet, requests, again)] == [0, 0, 0]
    for row in (host, asked_host):
        assert (row["copies"] > 0, row["reads"]) == (True, 0)
    for row in (files, asked_files):
        assert row["copies"] >= row["reads"] > 0
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 for row in (quiet, host, again))


@pytest.mark.parametrize("pool", [8, 128])
def test_the_tiers_do_not_overlap(pool: int) -> None:
    tiers = Tiers(pool, pool // 4, pool // 8)
    oldest_resident = tiers.total - tiers.pool
    oldest_staged = tiers.total - tiers.arena
    assert tiers.cached().stop == tiers.on_disk().start
    assert tiers.on_disk().stop <= oldest_staged - tiers.together
    assert tiers.staged().start >= oldest_staged + tiers.together
    assert tiers.staged().stop <= oldest_resident - tiers.together
    assert tiers.resident().stop == tiers.total


def test_a_power_law_gives_the_first_adapter_twice_what_the_second_gets() -> None:
    shares = popularity("power law", 100)
    assert shares[0] == pytest.approx(2 * shares[1])
    assert shares.sum() == pytest.approx(1)
    assert set(popularity("uniform", 4)) == {0.25}
