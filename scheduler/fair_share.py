"""Who is next: fair shares for tenants, and within a tenant for its adapters.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models"
(arXiv:2401.00588), on two levels. Each tenant, and each queue of a tenant (those of its requests
that want one adapter), counts the tokens it was served; the tenant that was served least is next,
and of its queues the one that was served least, first come first served. One that has not been
waiting is lifted to the least of those that are, so that idle time gives no credit. Who was
preempted goes before everybody, and is not charged for that.

Of a tenant's queues, one whose adapter runs may be ahead of the others by AFFINITY_TOKENS, as long
as nobody is overdue: each distinct adapter more in a step costs time that everybody pays.

A queue whose adapter has no room in the device's pool is passed by those behind it, but not for
ever: from `max_overtaking_seconds` after it was first passed nobody starts out of turn before it,
except without an adapter, which takes nothing that it lacks.
"""

import math
from bisect import insort
from collections.abc import Iterable
from itertools import takewhile

from pipeline.messages import AdapterKey
from scheduler.policy import Turn, by_order, discard
from scheduler.sequence import Sequence

INPUT_COST = 1.0  # per prompt token that is computed
OUTPUT_COST = 2.0  # per produced token; both as in the paper
AFFINITY_TOKENS = 4096.0  # that a queue whose adapter is in the batch may be ahead of another
FEW_COUNTERS = 1024  # as many are kept without a look at which of them are idle


class Tenant:
    """Whose requests they are; what it was served, over all its queues."""

    __slots__ = (
        "blocked",
        "few_queues",
        "name",
        "open",
        "passed",
        "queues",
        "ready",
        "running",
        "served",
        "since",
    )

    def __init__(self, name: str, served: float) -> None:
        self.name = name
        self.served = served
        self.since = 0  # the order of the sequence that it has been waiting with since
        self.queues: dict[AdapterKey | None, Queue] = {}
        self.ready: dict[Queue, None] = {}  # with somebody who can start
        self.blocked: dict[Queue, None] = {}  # with somebody who lacks room, and not passed yet
        self.passed: dict[Queue, None] = {}  # the same, in the order of passed_at
        self.few_queues = FEW_COUNTERS
        self.running = 0  # sequences that have started, a preempted one as well
        self.open = 0  # sequences that have not ended


class Queue:
    """The requests of one tenant for one adapter, or for none."""

    __slots__ = ("key", "open", "passed_at", "running", "served", "tenant", "waiting")

    def __init__(self, tenant: Tenant, key: AdapterKey | None, served: float) -> None:
        self.tenant = tenant
        self.key = key
        self.served = served
        self.waiting: list[Sequence] = []  # in order
        self.open = 0
        self.running = 0  # as of the tenant
        self.passed_at = math.inf  # when it was first passed, since it is blocked

    def turn(self) -> Turn:
        tenant = self.tenant
        return (tenant.served, tenant.since, *_queue_turn(self))


def _tenant_turn(tenant: Tenant) -> tuple[float, int]:
    return (tenant.served, tenant.since)


def _queue_turn(queue: Queue) -> tuple[float, int]:
    return (queue.served, queue.waiting[0].order)


def _affine_turn(queue: Queue) -> tuple[float, int]:
    affinity = AFFINITY_TOKENS if queue.running else 0.0
    return (queue.served - affinity, queue.waiting[0].order)


class FairShare:
    """The product's policy.

    max_overtaking_seconds  how long a blocked queue is passed
    max_tenant_running      sequences of one tenant that run at once; 0: any number
    """

    def __init__(self, *, max_overtaking_seconds: float, max_tenant_running: int) -> None:
        self._max_overtaking_seconds = max_overtaking_seconds
        self._max_tenant_running = max_tenant_running or math.inf
        self._tenants: dict[str, Tenant] = {}
        self._resumed = Tenant("", -math.inf)  # the preempted ones: before everybody
        self._share_of: dict[Sequence, Queue] = {}  # what a sequence is charged to, until its end
        self._queue_of: dict[Sequence, Queue] = {}  # where it waits
        self._waiting: dict[Tenant, int] = {}  # how many, of those that have any
        self._ready: dict[Tenant, None] = {}
        self._queues_of: dict[AdapterKey, dict[Queue, None]] = {}  # in which somebody waits
        self._admitted: set[AdapterKey] = set()
        self._blocked: set[AdapterKey] = set()
        self._unpassed: dict[Tenant, None] = {}  # with blocked queues that nobody has passed
        self._passed: dict[Tenant, None] = {}  # with blocked queues that have been passed
        self._last = Tenant("", 0.0)  # to wait
        self._few_tenants = FEW_COUNTERS

    def served(self, tenant: str) -> float:
        """The weighted tokens on a tenant's counter."""
        return self._tenants[tenant].served

    @property
    def counters(self) -> int:
        """How many tenants have one."""
        return len(self._tenants)

    # --- sequences ---

    def join(self, sequence: Sequence) -> None:
        if sequence.started is None:
            queue = self._open(sequence)
        else:
            queue = _queue(self._resumed, sequence.adapter)
        tenant = queue.tenant
        if tenant not in self._waiting:
            self._lift(tenant)
            tenant.since = sequence.order
            self._waiting[tenant] = 0
        if not queue.waiting:
            self._lift_queue(queue)
        self._waiting[tenant] += 1
        self._queue_of[sequence] = queue
        insort(queue.waiting, sequence, key=by_order)
        if len(queue.waiting) == 1:
            self._queue_waits(queue)

    def leave(self, sequence: Sequence) -> None:
        queue = self._queue_of.pop(sequence, None)
        if queue is None:
            return
        tenant = queue.tenant
        discard(queue.waiting, sequence)
        if not queue.waiting:
            self._queue_is_empty(queue)
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            if tenant is not self._resumed:
                self._last = tenant

    def start(self, sequence: Sequence, tokens: int, now: float) -> None:
        self._note_passed(self._queue_of[sequence], now)
        self.leave(sequence)
        if sequence.started is not None:
            return
        queue = self._share_of[sequence]
        queue.served += INPUT_COST * tokens
        queue.tenant.served += INPUT_COST * tokens
        queue.running += 1
        queue.tenant.running += 1

    def end(self, sequence: Sequence) -> None:
        queue = self._share_of.pop(sequence, None)
        if queue is None:
            return
        queue.open -= 1
        queue.tenant.open -= 1
        if sequence.started is not None:
            queue.running -= 1
            queue.tenant.running -= 1

    def produced(self, sequences: Iterable[Sequence]) -> None:
        share_of = self._share_of
        for sequence in sequences:
            queue = share_of.get(sequence)
            if queue is not None:
                queue.served += OUTPUT_COST
                queue.tenant.served += OUTPUT_COST

    # --- adapters ---

    def admit(self, key: AdapterKey) -> None:
        self._admitted.add(key)
        for queue in self._queues_of.get(key, ()):
            self._set_ready(queue)

    def shut(self, key: AdapterKey) -> None:
        self._admitted.discard(key)
        for queue in self._queues_of.get(key, ()):
            self._set_unready(queue)

    def block(self, key: AdapterKey) -> None:
        self._blocked.add(key)
        for queue in self._queues_of.get(key, ()):
            self._set_blocked(queue)

    def unblock(self, key: AdapterKey) -> None:
        self._blocked.discard(key)
        for queue in self._queues_of.get(key, ()):
            self._set_unblocked(queue)

    # --- who is next ---

    def first(self, now: float) -> Sequence | None:
        tenants = [tenant for tenant in self._ready if self._may_run(tenant)]
        if not tenants:
            return None
        barrier = self._barrier(now)
        turn = _affine_turn if barrier is None else _queue_turn
        queue = min(min(tenants, key=_tenant_turn).ready, key=turn)
        if barrier is None or queue.key is None or queue.turn() < barrier.turn():
            return queue.waiting[0]
        plain = [one for tenant in tenants for one in tenant.ready if one.key is None]
        return min(plain, key=Queue.turn).waiting[0] if plain else None

    def overdue(self, now: float) -> AdapterKey | None:
        barrier = self._barrier(now)
        return None if barrier is None else barrier.key

    def turn(self, key: AdapterKey) -> Turn:
        queues = self._queues_of[key]
        if len(queues) == 1:  # nearly always, and this runs for each adapter that lacks room
            return next(iter(queues)).turn()
        return min(queue.turn() for queue in queues)

    def yields(self, key: AdapterKey, other: AdapterKey, now: float) -> bool:
        return self.turn(other) < self.turn(key)

    def _barrier(self, now: float) -> Queue | None:
        """The first in turn of the queues that have been passed for long enough."""
        tenants = [
            tenant
            for tenant in self._passed
            if self._is_overdue(next(iter(tenant.passed)), now) and self._may_run(tenant)
        ]
        if not tenants:
            return None
        passed = min(tenants, key=_tenant_turn).passed
        overdue = takewhile(lambda queue: self._is_overdue(queue, now), passed)
        return min(overdue, key=_queue_turn)

    def _is_overdue(self, queue: Queue, now: float) -> bool:
        return now - queue.passed_at >= self._max_overtaking_seconds

    def _note_passed(self, queue: Queue, now: float) -> None:
        """The first of this queue starts, before all blocked queues whose turn comes first."""
        if queue.key is None:
            return
        turn = _tenant_turn(queue.tenant)
        for tenant in list(self._unpassed):
            if not self._may_run(tenant) or _tenant_turn(tenant) > turn:
                continue
            for blocked in list(tenant.blocked):
                if tenant is not queue.tenant or _queue_turn(blocked) < _queue_turn(queue):
                    del tenant.blocked[blocked]
                    blocked.passed_at = now
                    tenant.passed[blocked] = None
                    self._passed[tenant] = None
            if not tenant.blocked:
                del self._unpassed[tenant]

    def _may_run(self, tenant: Tenant) -> bool:
        return tenant.running < self._max_tenant_running

    # --- counters ---

    def _open(self, sequence: Sequence) -> Queue:
        tenant = self._tenants.get(sequence.tenant)
        if tenant is None:
            self._forget_idle()
            tenant = self._tenants[sequence.tenant] = Tenant(sequence.tenant, 0.0)
        queue = _queue(tenant, sequence.adapter)
        tenant.open += 1
        queue.open += 1
        self._share_of[sequence] = queue
        return queue

    def _floor(self) -> float:
        """The least that a tenant that starts to wait is lifted to."""
        others = (tenant.served for tenant in self._waiting if tenant is not self._resumed)
        return min(others, default=self._last.served)

    def _lift(self, tenant: Tenant) -> None:
        if tenant is not self._resumed:
            tenant.served = max(tenant.served, self._floor())

    def _lift_queue(self, queue: Queue) -> None:
        others = [other.served for other in queue.tenant.queues.values() if other.waiting]
        queue.served = max(queue.served, min(others, default=queue.served))

    def _forget_idle(self) -> None:
        """Drop the counters that a return would lift as far as a new one."""
        if len(self._tenants) < self._few_tenants:
            return
        floor = self._floor()
        for tenant in list(self._tenants.values()):
            if not tenant.open and tenant.served <= floor:
                del self._tenants[tenant.name]
        self._few_tenants = max(FEW_COUNTERS, 2 * len(self._tenants))

    # --- which queues can start, and which can be passed ---

    def _queue_waits(self, queue: Queue) -> None:
        key = queue.key
        if key is not None:
            self._queues_of.setdefault(key, {})[queue] = None
        if key is None or key in self._admitted:
            self._set_ready(queue)
        elif key in self._blocked:
            self._set_blocked(queue)

    def _queue_is_empty(self, queue: Queue) -> None:
        self._set_unready(queue)
        self._set_unblocked(queue)
        if queue.key is not None:
            queues = self._queues_of[queue.key]
            del queues[queue]
            if not queues:
                del self._queues_of[queue.key]
        if queue.tenant is self._resumed:
            del queue.tenant.queues[queue.key]

    def _set_ready(self, queue: Queue) -> None:
        queue.tenant.ready[queue] = None
        self._ready[queue.tenant] = None

    def _set_unready(self, queue: Queue) -> None:
        tenant = queue.tenant
        tenant.ready.pop(queue, None)
        if not tenant.ready:
            self._ready.pop(tenant, None)

    def _set_blocked(self, queue: Queue) -> None:
        queue.tenant.blocked[queue] = None
        self._unpassed[queue.tenant] = None

    def _set_unblocked(self, queue: Queue) -> None:
        tenant = queue.tenant
        queue.passed_at = math.inf
        tenant.passed.pop(queue, None)
        if not tenant.passed:
            self._passed.pop(tenant, None)
        tenant.blocked.pop(queue, None)
        if not tenant.blocked:
            self._unpassed.pop(tenant, None)


def _queue(tenant: Tenant, key: AdapterKey | None) -> Queue:
    queue = tenant.queues.get(key)
    if queue is None:
        _forget_idle_queues(tenant)
        queue = tenant.queues[key] = Queue(tenant, key, 0.0)
    return queue


def _forget_idle_queues(tenant: Tenant) -> None:
    """As for tenants; all idle ones when nobody waits."""
    if len(tenant.queues) < tenant.few_queues:
        return
    floor = min((queue.served for queue in tenant.queues.values() if queue.waiting), default=None)
    for queue in list(tenant.queues.values()):
        if not queue.open and (floor is None or queue.served <= floor):
            del tenant.queues[queue.key]
    tenant.few_queues = max(FEW_COUNTERS, 2 * len(tenant.queues))
