"""Draw what scheduler_sim has found, as SVG.

python -m benchmarks.simulation.plot RESULTS.json PLOT.svg
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

WIDTH, PANEL, HEIGHT = 860, 150, 100  # of the page, of a panel with its title, of its bars
LEFT, BAR, GAP = 60, 14, 40
COLOURS = {"fair share": "#1b6ca8", "first come": "#d1871f", "time slices": "#8a8a8a"}

Row = dict[str, Any]


class Panel(NamedTuple):
    """One figure of each row. A row that has none has no bar.

    least  where a logarithmic axis begins; None: the axis is linear, from 0
    """

    title: str
    value: Callable[[Row], float | None]
    unit: str
    least: float | None = None

    def height(self, value: float, most: float) -> float:
        """Of a bar, from 0 to 1."""
        if self.least is None:
            return value / most
        return max(math.log(value / self.least) / math.log(most / self.least), 0.01)


def _first_token(whose: str, which: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        found = row["first_token"][whose]
        return None if found is None else float(found[which])

    return value


HOT, COLD = "time to first token, adapter resident", "time to first token, adapter not resident"
LEAST = 0.01  # seconds
PANELS = (
    Panel("throughput, prompt and output", lambda row: row["tokens_per_second"], "tokens/s"),
    Panel(f"{HOT}, p50", _first_token("victims_hot", "p50"), "s", LEAST),
    Panel(f"{HOT}, p99", _first_token("victims_hot", "p99"), "s", LEAST),
    Panel(f"{COLD}, p50", _first_token("victims_cold", "p50"), "s", LEAST),
    Panel(f"{COLD}, p99", _first_token("victims_cold", "p99"), "s", LEAST),
    Panel("Jain's index over tenants that wait", lambda row: row["jain"], ""),
    Panel("longest time an adapter was passed", lambda row: row["longest_passed_seconds"], "s"),
)


def draw(rows: list[Row]) -> str:
    """A panel for each figure, in it a group of bars for each scenario, a bar for each policy."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
        f'height="{40 + PANEL * len(PANELS)}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (policy, colour) in enumerate(COLOURS.items()):
        x = LEFT + number * 130
        parts.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="20">{escape(policy)}</text>')
    for number, panel in enumerate(PANELS):
        parts += _draw_panel(panel, rows, scenarios, 40 + number * PANEL)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_panel(panel: Panel, rows: list[Row], scenarios: list[str], top: int) -> list[str]:
    values = {(row["scenario"], row["policy"]): panel.value(row) for row in rows}
    most = max((value for value in values.values() if value is not None), default=0.0) or 1.0
    base = top + 20 + HEIGHT
    title = f"{panel.title}, {panel.unit}" if panel.unit else panel.title
    parts = [
        f'<text x="{LEFT}" y="{top + 10}" font-weight="bold">{escape(title)}</text>',
        f'<line x1="{LEFT}" y1="{base}" x2="{WIDTH - 20}" y2="{base}" stroke="black"/>',
    ]
    group = (WIDTH - LEFT - 20) // len(scenarios)
    for place, scenario in enumerate(scenarios):
        left = LEFT + place * group
        parts.append(f'<text x="{left}" y="{base + 13}">{escape(scenario)}</text>')
        for number, (policy, colour) in enumerate(COLOURS.items()):
            value = values.get((scenario, policy))
            if value is None:
                continue
            height = panel.height(value, most) * (HEIGHT - 12)
            x = left + number * (BAR + GAP)
            parts.append(
                f'<rect x="{x}" y="{base - height:.1f}" width="{BAR}" height="{height:.1f}" '
                f'fill="{colour}"/><text x="{x}" y="{base - height - 3:.1f}">{_label(value)}</text>'
            )
    return parts


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main() -> None:
    results, plot = map(Path, sys.argv[1:])
    plot.write_text(draw(json.loads(results.read_text())["rows"]))


if __name__ == "__main__":
    main()
