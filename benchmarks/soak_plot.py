"""Draw what a soak has seen, as SVG: memory, queue and latency over time."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, PANEL, HEIGHT = 860, 190, 140  # of the page, of a panel with its title, of its lines
LEFT, RIGHT = 60, 200  # beside the lines; the legend is at the right
COLOURS = ("#1b6ca8", "#d1871f", "#3a8f4d", "#a83a3a", "#6b4ba1")
MEMORY = ("frontend", "tokenizer_workers", "scheduler", "gpu_worker", "adapter_loader")
PANELS: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("anonymous memory, MB", tuple(f"memory {name}" for name in MEMORY), 1e-6),
    ("requests that run and wait", ("running", "waiting"), 1.0),
    ("time of a request, s", ("p50", "p99"), 1.0),
)


def draw(samples: Sequence[Mapping[str, float]]) -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" '
        f'height="{PANEL * len(PANELS) + 20}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, names, scale) in enumerate(PANELS):
        parts += _panel(samples, title, names, scale, top=10 + number * PANEL)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    samples: Sequence[Mapping[str, float]],
    title: str,
    names: Sequence[str],
    scale: float,
    top: int,
) -> list[str]:
    base, right = top + 20 + HEIGHT, WIDTH - RIGHT
    first = samples[0]["at"] if samples else 0.0
    span = (samples[-1]["at"] - first if samples else 0.0) or 1.0
    most = max((one[name] * scale for one in samples for name in names), default=0.0) or 1.0
    parts = [
        f'<text x="{LEFT}" y="{top + 10}" font-weight="bold">{escape(title)}</text>',
        f'<line x1="{LEFT}" y1="{base}" x2="{right}" y2="{base}" stroke="black"/>',
        f'<text x="{LEFT - 6}" y="{top + 26}" text-anchor="end">{most:.3g}</text>',
        f'<text x="{LEFT - 6}" y="{base}" text-anchor="end">0</text>',
        f'<text x="{right}" y="{base + 13}" text-anchor="end">{span:.0f} s</text>',
    ]
    for number, name in enumerate(names):
        colour = COLOURS[number]
        points = " ".join(
            f"{LEFT + (one['at'] - first) / span * (right - LEFT):.1f},"
            f"{base - one[name] * scale / most * HEIGHT:.1f}"
            for one in samples
        )
        y = top + 30 + number * 16
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        parts.append(f'<rect x="{right + 12}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        label = escape(name.removeprefix("memory "))
        parts.append(f'<text x="{right + 28}" y="{y}">{label}</text>')
    return parts
