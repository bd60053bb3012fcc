"""An adapter loader without files: answers when the test says, and counts leases."""

from pipeline.adapter_layout import pack_ranks
from pipeline.messages import (
    AdapterDropped,
    AdapterFailed,
    AdapterKey,
    AdapterStaged,
    Failure,
    FailureKind,
    ForgetAdapter,
    Leased,
    LoadAdapter,
    ReleaseAdapter,
)

NOT_FOUND = Failure(404, FailureKind.ADAPTER_NOT_FOUND, "there is no such adapter")
UNAVAILABLE = Failure(503, FailureKind.ADAPTER_UNAVAILABLE, "its source does not answer")


class FakeLoader:
    def __init__(self) -> None:
        self.loads: list[LoadAdapter] = []  # not answered
        self.leases: dict[int, AdapterKey] = {}  # by arena offset
        self.arena: dict[int, str] = {}  # content by arena offset
        self.contents: dict[AdapterKey, set[str]] = {}  # all that were ever staged
        self.forgets: list[AdapterKey] = []  # not answered
        self._before: dict[int, AdapterKey] = {}  # leases of a predecessor
        self._offset = 0

    def start_over(self) -> None:
        """It has died and was started again: nothing is leased until the scheduler says so."""
        self.loads.clear()
        self.forgets.clear()
        self._before, self.leases = self.leases, {}

    def reuse(self) -> None:
        """Whatever is not leased is overwritten."""
        for offset in self._before.keys() - self.leases.keys():
            del self.arena[offset]
        self._before = {}

    def send(self, message: LoadAdapter | Leased | ReleaseAdapter | ForgetAdapter) -> None:
        if isinstance(message, Leased):
            for lease in message.leases:
                assert self._before[lease.arena_offset] == lease.adapter, "it was not leased"
                self.leases[lease.arena_offset] = lease.adapter
        elif isinstance(message, ReleaseAdapter):
            assert self.leases.pop(message.arena_offset) == message.adapter
            del self.arena[message.arena_offset]
        elif isinstance(message, ForgetAdapter):
            assert message.adapter not in [load.adapter for load in self.loads], "it is loading"
            assert message.adapter not in self.leases.values(), "it is leased"
            self.forgets.append(message.adapter)
        else:
            assert message.adapter not in [load.adapter for load in self.loads], "asked twice"
            assert message.adapter not in self.forgets, "it is being forgotten"
            self.loads.append(message)

    def forget(self, which: int = 0) -> AdapterDropped:
        return AdapterDropped(self.forgets.pop(which))

    def stage(self, which: int = 0, *, content: str = "", nbytes: int = 512) -> AdapterStaged:
        """Answer a load. The content is the adapter's id unless given."""
        key = self.loads.pop(which).adapter
        content = content or key.id
        self._offset += 4096
        self.leases[self._offset] = key
        self.arena[self._offset] = content
        self.contents.setdefault(key, set()).add(content)
        return AdapterStaged(key, content, self._offset, nbytes, pack_ranks([8] * 7))

    def fail(self, which: int = 0, failure: Failure = NOT_FOUND) -> AdapterFailed:
        return AdapterFailed(self.loads.pop(which).adapter, failure)
