"""Who is next: fair shares for tenants, and turns for the adapters of a tenant.

Each tenant counts the tokens it was served, and the one that was served least is next: the virtual
token counter of Sheng et al., "Fairness in Serving Large Language Models" (arXiv:2401.00588). One
that has not been waiting is lifted to the least of those that are, so that idle time gives no
credit. Who was preempted goes before everybody, and is not charged for that.

The queues of a tenant, one for each adapter that its requests want and one for none, stand in a
line and take turns: the deficit round robin of Shreedhar and Varghese (SIGCOMM 1995). Who starts to
wait comes last. The first in line begins its turn and goes to the end of the line; it is served
before the line until the tokens of its turn are used up, or nobody is left that waits or runs. What
it takes beyond is taken off its next one. Each distinct adapter in a step costs time that everybody
pays, and a turn lets those that wait for the same one run together. A turn has ROW_TOKENS for each
row, but no more than WAITING_TOKENS for each request of the tenant that waits: newcomers may put
off the few that wait, but not for longer than their number would.

A queue whose adapter has no room in the device's pool is passed by those behind it, but not for
ever: from `max_overtaking_seconds` after it was first passed nobody starts out of turn before it,
except without an adapter, which takes nothing that it lacks. A turn counts as overtaking too, and
rests while one of its own tenant is overdue.
"""

import math
from bisect import insort
from collections.abc import Callable, Collection, Iterable
from itertools import takewhile
from operator import attrgetter
from typing import Any

from pipeline.messages import AdapterKey
from scheduler.policy import Turn, by_order, discard
from scheduler.sequence import Sequence

INPUT_COST = 1.0  # per prompt token that is computed
OUTPUT_COST = 2.0  # per produced token; both as in the paper
ROW_TOKENS = 64.0  # of a turn, so weighted; for 256 rows 20 requests of 260 and 260 tokens
WAITING_TOKENS = 96.0  # of a turn at most; an eighth of such a request
FEW_COUNTERS = 1024  # as many are kept without a look at which of them are idle


class Tenant:
    """Whose requests they are; what it was served, over all its queues."""

    __slots__ = (
        "blocked",
        "line",
        "name",
        "open",
        "passed",
        "queues",
        "running",
        "served",
        "since",
        "turns",
    )

    def __init__(self, name: str, served: float) -> None:
        self.name = name
        self.served = served
        self.since = 0  # the order of the sequence that it has been waiting with since
        self.queues: dict[AdapterKey | None, Queue] = {}
        self.line: list[Queue] = []  # those with somebody who can start, by place
        self.turns: dict[Queue, None] = {}  # those with tokens left of a turn
        self.blocked: dict[Queue, None] = {}  # with somebody who lacks room, and not passed yet
        self.passed: dict[Queue, None] = {}  # the same, in the order of passed_at
        self.running = 0  # sequences that have started, a preempted one as well
        self.open = 0  # sequences that have not ended


class Queue:
    """The requests of one tenant for one adapter, or for none."""

    __slots__ = (
        "key",
        "left",
        "open",
        "passed_at",
        "place",
        "ready",
        "running",
        "tenant",
        "waiting",
    )

    def __init__(self, tenant: Tenant, key: AdapterKey | None) -> None:
        self.tenant = tenant
        self.key = key
        self.place = 0  # in the line of the tenant's queues: the least is first
        self.left = 0.0  # tokens of its turn; less than none is taken off the next
        self.waiting: list[Sequence] = []  # in order
        self.ready = False  # it is in the line
        self.open = 0
        self.running = 0  # as of the tenant
        self.passed_at = math.inf  # when it was first passed, since it is blocked

    def turn(self) -> Turn:
        tenant = self.tenant
        return (tenant.served, tenant.since, self.place, self.waiting[0].order)


_by_place = attrgetter("place")
_by_left = attrgetter("left")


def _tenant_turn(tenant: Tenant) -> tuple[float, int]:
    return (tenant.served, tenant.since)


def _queue_turn(queue: Queue) -> tuple[int, int]:
    return (queue.place, queue.waiting[0].order)


class FairShare:
    """The product's policy.

    max_overtaking_seconds  how long a blocked queue is passed
    max_tenant_running      sequences of one tenant that run at once; 0: any number
    rows                    sequences that run at once
    """

    def __init__(
        self, *, max_overtaking_seconds: float, max_tenant_running: int, rows: int
    ) -> None:
        self._rows = rows
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
        self._passed_since = math.inf  # none of those that are was passed before
        self._last = Tenant("", 0.0)  # to wait
        self._places = 0  # that have been given
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
        if not queue.waiting and tenant is not self._resumed:  # among those the oldest is first
            queue.place = self._last_place()
            if queue not in tenant.turns:
                queue.left = 0.0
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
        if sequence.started is not None:
            self.leave(sequence)
            return
        queue = self._share_of[sequence]
        if queue not in queue.tenant.turns or queue.left <= 0:
            self._begin_turn(queue)
        tenant = queue.tenant
        queue.left -= INPUT_COST * tokens
        tenant.served += INPUT_COST * tokens
        queue.running += 1
        tenant.running += 1
        self.leave(sequence)

    def end(self, sequence: Sequence) -> None:
        queue = self._share_of.pop(sequence, None)
        if queue is None:
            return
        tenant = queue.tenant
        queue.open -= 1
        tenant.open -= 1
        if sequence.started is not None:
            queue.running -= 1
            tenant.running -= 1
        if not (queue.running or queue.waiting):
            tenant.turns.pop(queue, None)
        if not queue.open:
            del tenant.queues[queue.key]

    def produced(self, sequences: Iterable[Sequence]) -> None:
        for queue in map(self._share_of.get, sequences):
            if queue is not None:
                queue.left -= OUTPUT_COST
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
        tenants = self._below_limit(self._ready)
        if not tenants:
            return None
        barrier = self._barrier(now)
        tenant = min(tenants, key=_tenant_turn)
        in_line = barrier is not None and barrier.tenant is tenant
        queue = self._first_in_line(tenant) if in_line else self._next_of(tenant)
        if barrier is None or queue.key is None or queue.turn() < barrier.turn():
            return queue.waiting[0]
        plain = [one for tenant in tenants for one in tenant.line if one.key is None]
        return min(plain, key=Queue.turn).waiting[0] if plain else None

    def overdue(self, now: float) -> AdapterKey | None:
        barrier = self._barrier(now)
        return None if barrier is None else barrier.key

    def turn(self, key: AdapterKey) -> Turn:
        queues = self._queues_of[key]
        if len(queues) == 1:  # nearly always, and this runs for each adapter that lacks room
            return next(iter(queues)).turn()
        return min(queue.turn() for queue in queues)

    def blocked_in_turn(self, most: int) -> list[AdapterKey]:
        found: dict[AdapterKey | None, None] = {}
        for tenant in sorted({**self._unpassed, **self._passed}, key=_tenant_turn):
            for queue in sorted([*tenant.blocked, *tenant.passed], key=self._in_line(tenant)):
                found[queue.key] = None
            if len(found) >= most:
                break
        return [key for key in found if key is not None][:most]

    def yields(self, key: AdapterKey, other: AdapterKey, now: float) -> bool:
        return self.turn(other) < self.turn(key)

    def _barrier(self, now: float) -> Queue | None:
        """The first in turn of the queues that have been passed for long enough."""
        since = now - self._max_overtaking_seconds
        if self._passed_since > since:
            return None
        first_passed = [(next(iter(one.passed)).passed_at, one) for one in self._passed]
        self._passed_since = min([at for at, _ in first_passed], default=math.inf)
        tenants = self._below_limit([one for at, one in first_passed if at <= since])
        if not tenants:
            return None
        tenant = min(tenants, key=_tenant_turn)
        overdue = takewhile(lambda queue: queue.passed_at <= since, tenant.passed)
        return min(overdue, key=self._in_line(tenant))

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
                    self._passed_since = min(self._passed_since, now)
            if not tenant.blocked:
                del self._unpassed[tenant]

    def _may_run(self, tenant: Tenant) -> bool:
        return tenant.running < self._max_tenant_running

    def _in_line(self, tenant: Tenant) -> Callable[[Queue], Any]:
        """What to compare its queues by. Places differ, but for those that are not given any."""
        return _queue_turn if tenant is self._resumed else _by_place

    def _below_limit(self, tenants: Collection[Tenant]) -> Collection[Tenant]:
        """Those of them that may run one more; called often, and mostly there is no limit."""
        if self._max_tenant_running == math.inf:
            return tenants
        return [tenant for tenant in tenants if self._may_run(tenant)]

    # --- the turns of a tenant's queues ---

    def _next_of(self, tenant: Tenant) -> Queue:
        """Of those with somebody who can start: in its turn, or else the first in line."""
        for queue in tenant.turns:
            if queue.ready and queue.left > 0:
                return queue
        return self._first_in_line(tenant)

    def _first_in_line(self, tenant: Tenant) -> Queue:
        """Those whose next turn is used up already let others go first."""
        line = tenant.line
        if tenant is self._resumed:
            return min(line, key=_queue_turn)
        turn_tokens = self._turn_tokens(tenant)
        first = next((queue for queue in line if queue.left > -turn_tokens), None)
        return max(line, key=_by_left) if first is None else first

    def _begin_turn(self, queue: Queue) -> None:
        """It goes to the end of the line, behind those that this turn of theirs is taken from."""
        line = queue.tenant.line
        turn_tokens = self._turn_tokens(queue.tenant)
        before = line[: line.index(queue)]
        for one in [*(one for one in before if one.left <= -turn_tokens), queue]:
            one.left = min(one.left, 0.0) + turn_tokens
            line.remove(one)
            line.append(one)
            one.place = self._last_place()
        queue.tenant.turns[queue] = None

    def _turn_tokens(self, tenant: Tenant) -> float:
        return min(ROW_TOKENS * self._rows, WAITING_TOKENS * self._waiting[tenant])

    def _last_place(self) -> int:
        self._places += 1
        return self._places

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
        if not queue.running:
            queue.tenant.turns.pop(queue, None)
        if queue.key is not None:
            queues = self._queues_of[queue.key]
            del queues[queue]
            if not queues:
                del self._queues_of[queue.key]
        if queue.tenant is self._resumed:
            del queue.tenant.queues[queue.key]

    def _set_ready(self, queue: Queue) -> None:
        if not queue.ready:
            queue.ready = True
            insort(queue.tenant.line, queue, key=_by_place)
        self._ready[queue.tenant] = None

    def _set_unready(self, queue: Queue) -> None:
        line = queue.tenant.line
        if queue.ready:
            queue.ready = False
            line.remove(queue)
        if not line:
            self._ready.pop(queue.tenant, None)

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
        queue = tenant.queues[key] = Queue(tenant, key)
    return queue
