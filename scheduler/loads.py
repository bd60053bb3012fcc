"""Which adapters the loader is asked for, when, and on whose account.

It is asked in the order of the policy's turns, for so many of each tenant at a time: who wants
thousands at once must not fill the arena, nor stand before all others in the loader's queue.
"""

import heapq
from collections import Counter
from collections.abc import Callable

from pipeline.messages import AdapterKey, LoadAdapter
from scheduler.adapter import Adapter
from scheduler.policy import Policy, Turn

MAX_LOADS = 32  # of one tenant that are loading, or staged and without room


class Loads:
    """What has been asked, and what is to be. `send` tells the loader, once there is one."""

    def __init__(
        self, *, policy: Policy, send: Callable[[LoadAdapter], None], load_seconds: float
    ) -> None:
        self._policy = policy
        self._send = send
        self._load_seconds = load_seconds
        self._wanted: dict[str, dict[AdapterKey, Adapter]] = {}  # not asked for yet, by tenant
        self._loads: Counter[str] = Counter()  # as MAX_LOADS counts them, by tenant
        self._have_fewer: set[str] = set()  # tenants, than before
        self._deadline_of: dict[AdapterKey, float] = {}  # of answers; soonest first
        self._unanswered: dict[AdapterKey, LoadAdapter] = {}
        self._loader_is_there = False

    # --- who wants what ---

    def may_ask(self, tenant: str) -> bool:
        """Whether this tenant may have one more load."""
        return self._loads[tenant] < MAX_LOADS

    def want(self, adapter: Adapter, tenant: str, now: float) -> None:
        """Ask for it as soon as this tenant, of which somebody waits for it, may have a load."""
        if adapter.asked_by is not None or adapter.retiring:
            return
        if not self.may_ask(tenant):
            self._wanted.setdefault(tenant, {})[adapter.key] = adapter
            return
        first = next(one for one in adapter.waiting if one.tenant == tenant)
        self.load(adapter, tenant, first.adapter_token, now, first.trace)

    def want_less(self, adapter: Adapter, tenant: str) -> None:
        """One of this tenant does not wait any more for what has not been asked for."""
        if all(sequence.tenant != tenant for sequence in adapter.waiting):
            self._not_wanted(adapter, tenant)

    def ask(self, now: float) -> None:
        """For the next in turn of the tenants that may have more loads."""
        tenants, self._have_fewer = self._have_fewer, set()
        for tenant in tenants:
            free = MAX_LOADS - self._loads[tenant]
            wanted = self._wanted.get(tenant, {}).values()
            waited_for = [adapter for adapter in wanted if adapter.waiting]
            for adapter in heapq.nsmallest(free, waited_for, key=self._turn):
                self.want(adapter, tenant, now)

    def load(
        self, adapter: Adapter, tenant: str, token: str | None, now: float, trace: str = ""
    ) -> None:
        """Ask for it on this tenant's account, until it is `over`."""
        for other in {tenant, *(sequence.tenant for sequence in adapter.waiting)}:
            self._not_wanted(adapter, other)
        adapter.asked_by = tenant
        self._loads[tenant] += 1
        if not adapter.loading:  # else it was evicted while it was asked about
            self.question(adapter, token, now, trace)

    def over(self, adapter: Adapter) -> None:
        """It has room, or cannot have any, or cannot be had."""
        if adapter.asked_by is None:
            return  # it has come in answer to a question about what was there before
        tenant, adapter.asked_by = adapter.asked_by, None
        self._loads[tenant] -= 1
        if not self._loads[tenant]:
            del self._loads[tenant]
        self._have_fewer.add(tenant)

    def _turn(self, adapter: Adapter) -> Turn:
        return self._policy.turn(adapter.key)

    def _not_wanted(self, adapter: Adapter, tenant: str) -> None:
        wanted = self._wanted.get(tenant, {})
        if wanted.pop(adapter.key, None) is not None and not wanted:
            del self._wanted[tenant]

    # --- questions and answers ---

    def question(self, adapter: Adapter, token: str | None, now: float, trace: str) -> None:
        """Ask for it, or whether it is still what it was."""
        adapter.loading = True
        adapter.asked_at = now
        self._deadline_of[adapter.key] = now + self._load_seconds
        message = self._unanswered[adapter.key] = LoadAdapter(adapter.key, token, trace)
        if self._loader_is_there:
            self._send(message)

    def loader_lost(self) -> None:
        """It is asked nothing until another has started."""
        self._loader_is_there = False

    def loader_started(self) -> None:
        """It was asked nothing before; its predecessor will answer nothing more."""
        self._loader_is_there = True
        for message in self._unanswered.values():
            self._send(message)

    def answered(self, adapter: Adapter) -> None:
        adapter.loading = False
        self._unanswered.pop(adapter.key, None)
        self._deadline_of.pop(adapter.key, None)
        for tenant in {sequence.tenant for sequence in adapter.waiting}:
            self._not_wanted(adapter, tenant)

    def expect(self, adapter: Adapter, now: float) -> None:
        """Somebody joins those that wait for an answer, which may be overdue already."""
        self._deadline_of.setdefault(adapter.key, now + self._load_seconds)

    def overdue(self, now: float) -> list[AdapterKey]:
        """Those whose answer should have come, each once."""
        keys = []
        while self._deadline_of:
            key, deadline = next(iter(self._deadline_of.items()))
            if deadline > now:
                break
            del self._deadline_of[key]
            keys.append(key)
        return keys

    def next_deadline(self) -> float | None:
        return next(iter(self._deadline_of.values()), None)
