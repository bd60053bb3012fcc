"""Source `local`: folders below the allow-listed roots."""

from collections.abc import Sequence
from pathlib import Path

from adapter_loader.refusals import not_found
from adapter_loader.sources import AdapterFiles, open_files
from adapter_loader.texts import Texts, read_texts
from pipeline.adapter_roots import CONFIG_FILE, find_local
from pipeline.messages import AdapterKey


class LocalSource:
    """roots are resolved paths; max_adapter_bytes bounds the weight file."""

    def __init__(self, *, roots: Sequence[Path], max_adapter_bytes: int) -> None:
        self._roots = tuple(roots)
        self._max_adapter_bytes = max_adapter_bytes

    def lane(self, key: AdapterKey) -> str:
        """See Source."""
        return key.source

    def texts(self, key: AdapterKey, token: str | None, known: str) -> Texts | None:
        """See Source."""
        return read_texts(self._folder(key), known, self._roots)

    def fetch(self, key: AdapterKey, token: str | None) -> AdapterFiles:
        """See Source."""
        try:
            return open_files(self._folder(key), self._max_adapter_bytes, self._roots)
        except FileNotFoundError as error:  # it went away since it was found
            raise not_found(f"{CONFIG_FILE} is not there") from error

    def _folder(self, key: AdapterKey) -> Path:
        folder = None if key.revision else find_local(self._roots, key.id)
        if folder is None:
            raise not_found("there is no such adapter in the folders of this server")
        return folder
