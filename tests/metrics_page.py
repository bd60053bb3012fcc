"""docs/metrics.md, read: which metrics each process has."""

from pathlib import Path

import msgspec

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
ADDED_ON_THE_WAY = frozenset({"process", "index"})  # to every sample, by pipeline.metrics
PROCESSES = ("frontend", "tokenizer_workers", "scheduler", "adapter_loader", "gpu_worker")
OF_HISTOGRAMS = frozenset({"le"})


class Row(msgspec.Struct, frozen=True):
    """A line of one of the page's tables."""

    kind: str
    labels: frozenset[str]


def rows() -> dict[str, dict[str, Row]]:
    """process -> name of the metric, as it is shown -> its row."""
    tables: dict[str, dict[str, Row]] = {}
    process = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            process = line.removeprefix("## ")
        elif process in PROCESSES and line.startswith("| `"):
            _, name, kind, labels, meaning, _ = (cell.strip() for cell in line.split("|"))
            assert meaning, f"{name} has no meaning"
            names = frozenset(label.strip("` ") for label in labels.split(",") if label)
            tables.setdefault(process, {})[name.strip("`")] = Row(kind, names)
    return tables
