"""The names that administrators gave to adapters, and who still uses what a name meant. Pure.

The scheduler owns the names and sends all of them whenever one changes. It is told that they are
taken here once no request is left that began before and uses an adapter that has lost a name.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from pipeline import messages
from pipeline.messages import AdapterKey


class Aliases:
    """The names, as one frontend knows them.

    taken     called with a version once it is taken; versions in order
    frontend  its index
    """

    def __init__(self, taken: Callable[[int], None], frontend: int = 0) -> None:
        self._taken = taken
        self._frontend = frontend
        self._version = 0  # the latest
        self._key_of: dict[str, AdapterKey] = {}
        self._adapters_of: dict[int, frozenset[AdapterKey]] = {}  # request in flight -> its parts
        self._waiting: dict[int, set[int]] = {}  # version -> requests it waits for

    def find(self, name: str) -> AdapterKey | None:
        return self._key_of.get(name)

    def all(self) -> Mapping[str, AdapterKey]:
        """name -> what was loaded for it; its scope is that of the token it was loaded with."""
        return MappingProxyType(self._key_of)

    def replace(self, message: messages.Aliases) -> None:
        """These names hold from now on."""
        now = {name: key.public for name, key in message.names.items()}
        lost = {key.public for name, key in self._key_of.items() if now.get(name) != key.public}
        self._key_of = dict(message.names)
        self._version = message.version
        self._waiting[message.version] = {
            request_id for request_id, parts in self._adapters_of.items() if parts & lost
        }
        self._tell()

    def scheduler_started(self) -> messages.NamesKept | None:
        """Another incarnation, which is told these names, and waits for no version; None if there
        never were any."""
        self._waiting.clear()
        if not self._version:
            return None
        return messages.NamesKept(self._version, self._key_of, self._frontend)

    def began(self, request_id: int, adapter: AdapterKey) -> None:
        """A request with this adapter is in flight until it has `ended`."""
        self._adapters_of[request_id] = frozenset(part.public for part in adapter.parts)

    def ended(self, request_id: int) -> None:
        if self._adapters_of.pop(request_id, None) is not None and self._waiting:
            for requests in self._waiting.values():
                requests.discard(request_id)
            self._tell()

    def _tell(self) -> None:
        while self._waiting:
            version, requests = next(iter(self._waiting.items()))
            if requests:
                return
            del self._waiting[version]
            self._taken(version)
