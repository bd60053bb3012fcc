"""The scheduler's core under load, on a simulated clock, against other policies.

    python -m benchmarks.scheduler_sim [--requests N] [--policy P] [--scenario S] [--json FILE]

See docs/scheduling.md for what is simulated. Each run of a scenario under a policy is a row of the
file, which keeps the rows of earlier runs; `python -m benchmarks.simulation.plot` draws it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, machine
from benchmarks.simulation.policies import FirstComeFirstServed, TimeSlices
from benchmarks.simulation.run import ACTIVE_ADAPTERS, SETTINGS, Run
from benchmarks.simulation.workload import requests, scenarios
from scheduler.fair_share import FairShare
from scheduler.policy import Policy

CAPACITY = 50.0  # requests per second, about: what is served when more are asked for


def _product() -> Policy:
    return FairShare(
        max_overtaking_seconds=SETTINGS.max_overtaking_seconds,
        max_tenant_running=SETTINGS.max_tenant_running,
        rows=SETTINGS.rows,
    )


POLICIES: dict[str, Callable[[], Policy]] = {
    "fair share": _product,
    "first come": FirstComeFirstServed,
    "time slices": lambda: TimeSlices(active_adapters=ACTIVE_ADAPTERS),
}


def main() -> None:
    names = [scenario.name for scenario in scenarios(CAPACITY)]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1_000_000, help="over all scenarios")
    parser.add_argument("--capacity", type=float, default=CAPACITY, help="requests per second")
    parser.add_argument("--policy", choices=POLICIES, action="append")
    parser.add_argument("--scenario", choices=names, action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for scenario in scenarios(given.capacity):
        if scenario.name not in (given.scenario or names):
            continue
        asked = requests(scenario, round(given.requests * scenario.share))
        for policy in given.policy or POLICIES:
            run = Run(POLICIES[policy](), asked)
            run.run()
            row = {
                "scenario": scenario.name,
                "policy": policy,
                "commit": commit(),
                **run.figures(scenario.suspects),
            }
            print(json.dumps(row, indent=1), flush=True)
            if given.json is not None:
                _write(given.json, row)


def _write(path: Path, row: dict[str, Any]) -> None:
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    mine = (row["scenario"], row["policy"])
    rows = [one for one in rows if (one["scenario"], one["policy"]) != mine] + [row]
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
