"""Adapters of source `local`: folders below an allow-listed root."""

from collections.abc import Iterator, Sequence
from pathlib import Path

CONFIG_FILE = "adapter_config.json"
FOLDERS = ("", "model_weights", "model/model_weights")  # PEFT's; where a run of Ludwig has that
MAX_ID_CHARACTERS = 512


def find_local(roots: Sequence[Path], adapter_id: str) -> Path | None:
    """The folder of a local adapter, or None when no root holds it.

    Only what lies below a root after every symbolic link and `..` is resolved counts, so that an
    id cannot lead out of it. The roots are resolved paths; the first that has the adapter wins.
    The id of a run of Ludwig means the adapter in it.
    """
    if not adapter_id or len(adapter_id) > MAX_ID_CHARACTERS or not adapter_id.isprintable():
        return None
    for root in roots:
        try:
            if (root / adapter_id).resolve() == root:
                continue
            for within in FOLDERS:
                folder = (root / adapter_id / within).resolve()
                if folder.is_relative_to(root) and (folder / CONFIG_FILE).is_file():
                    return folder
        except (OSError, RuntimeError, ValueError):  # too long, no permission, a loop of links
            continue
    return None


def local_id(roots: Sequence[Path], adapter_id: str) -> str:
    """The one way an id is written: an absolute path below a root as the id that finds the same."""
    folder = Path(adapter_id)
    for root in roots:
        if folder != root and folder.is_relative_to(root):
            short = str(folder.relative_to(root))
            if find_local(roots, short) == find_local(roots, adapter_id):
                return short
    return adapter_id


def list_local(roots: Sequence[Path]) -> Iterator[str]:
    """The ids of the adapters that lie directly below a root, sorted, each once."""
    ids: set[str] = set()
    for root in roots:
        try:
            ids.update(entry.name for entry in root.iterdir())
        except OSError:
            continue
    return (name for name in sorted(ids) if find_local(roots, name) is not None)
