"""docs/metrics.md, read: which metrics each process has."""

from pathlib import Path

import msgspec

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
ADDED_ON_THE_WAY = frozenset({"process", "index"})  # to every sample, by pipeline.metrics
PROCESSES = ("frontend", "tokenizer_workers", "scheduler", "adapter_loader", "gpu_worker")
EVERY = "Every process"
ALIASES = "\n## Names of other servers\n"
OF_HISTOGRAMS = frozenset({"le"})


class AliasRow(msgspec.Struct, frozen=True):
    """A line of the table of other servers' names."""

    kind: str
    labels: frozenset[str]
    ours: tuple[str, ...]


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
        elif process in (EVERY, *PROCESSES) and line.startswith("| `"):
            _, name, kind, labels, meaning, _ = (cell.strip() for cell in line.split("|"))
            assert meaning, f"{name} has no meaning"
            tables.setdefault(process, {})[name.strip("`")] = Row(kind, frozenset(_names(labels)))
    return tables


def alias_rows() -> dict[str, AliasRow]:
    """Name of the alias, as it is shown -> its row."""
    found = {}
    for line in PAGE.read_text().partition(ALIASES)[2].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            _, name, kind, labels, ours, unit, _ = (cell.strip() for cell in line.split("|"))
            assert unit, f"{name} has no unit"
            found[name.strip("`")] = AliasRow(kind, frozenset(_names(labels)), tuple(_names(ours)))
    return found


def _names(cell: str) -> list[str]:
    return [name.strip("` ") for name in cell.split(",") if name]
