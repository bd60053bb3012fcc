"""A queue in which everybody has a turn, whatever one of them has put there: pure."""

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Tenants take turns, and so do the kinds of what each of them has put there; first in, first
    out among those of one kind."""

    def __init__(self) -> None:
        # the one whose turn it is stands first
        self._waiting: OrderedDict[str, OrderedDict[Hashable, deque[T]]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, tenant: str, kind: Hashable, one: T) -> None:
        self._waiting.setdefault(tenant, OrderedDict()).setdefault(kind, deque()).append(one)

    def take(self) -> T:
        """What is next; there is something."""
        tenant, kinds = next(iter(self._waiting.items()))
        kind, queue = next(iter(kinds.items()))
        one = queue.popleft()
        kinds.move_to_end(kind)
        self._waiting.move_to_end(tenant)
        if not queue:
            del kinds[kind]
        if not kinds:
            del self._waiting[tenant]
        return one
