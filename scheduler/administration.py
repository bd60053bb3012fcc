"""What administrators want: names for adapters, and adapters in the pool or out of it. Pure.

A command is a generator. It yields what it waits for, is sent the time when that holds, and
returns when it is done; Refused ends it with a failure. There are few of them, so all are looked
at whenever something has happened.

    load     the adapter arrives in the pool -> the name is told to all frontends -> done
    unload   the name is taken away, everywhere -> no request is left that began with it
             -> the adapter leaves the pool when nobody runs with it, then the arena -> done
    pin      the adapter arrives in the pool -> it is kept there -> done

An adapter that has another name still stays when one is unloaded. One that is asked for by its id
while it is unloaded is loaded anew afterwards.
"""

from collections.abc import Callable, Generator, Hashable
from typing import NamedTuple, assert_never

from pipeline.messages import (
    AdapterKey,
    AdminCommand,
    AdminDone,
    AdminVerb,
    Aliases,
    AliasesTaken,
    Failure,
    NamesKept,
)
from scheduler import failures
from scheduler.adapters import Adapters
from scheduler.catalogue import Catalogue


class Wait(NamedTuple):
    """What a command waits for. When the deadline passes first, it ends with `late`."""

    holds: Callable[[], bool]
    deadline: float | None = None
    late: Failure | None = None


class Refused(Exception):
    """The command cannot be done."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


Steps = Generator[Wait, float, None]


class _Running:
    """A command under way, and what it waits for."""

    __slots__ = ("command", "steps", "wait")

    def __init__(self, command: AdminCommand, steps: Steps) -> None:
        self.command = command
        self.steps = steps
        self.wait = next(steps)


class Administration:
    """All commands under way, and the names.

    send             tells a frontend, by its index
    load_seconds     how long an adapter may take to arrive
    pinned_fraction  share of the pool that may be pinned
    """

    def __init__(
        self,
        *,
        adapters: Adapters,
        catalogue: Catalogue,
        send: Callable[[int, AdminDone | Aliases], None],
        frontends: int,
        load_seconds: float,
        pinned_fraction: float,
    ) -> None:
        self._adapters = adapters
        self._catalogue = catalogue
        self._send = send
        self._load_seconds = load_seconds
        self._pinned_fraction = pinned_fraction
        self._key_of: dict[str, AdapterKey] = {}
        self._version = 0  # of the names
        self._taken = [0] * frontends  # the latest version that each frontend has taken
        self._running: list[_Running] = []
        self._busy: set[Hashable] = set()  # names and adapters that a command is about

    def names_of(self, key: AdapterKey) -> list[str]:
        """The names that an adapter has, whoever looks at it."""
        public = key.public
        return [name for name, named in self._key_of.items() if named.public == public]

    def command(self, message: AdminCommand, now: float) -> None:
        self._running.append(_Running(message, self._steps(message)))
        self.advance(now)

    def frontend_started(self, frontend: int) -> None:
        """It knows no name yet."""
        self._taken[frontend] = 0
        if self._version:
            self._send(frontend, Aliases(self._version, dict(self._key_of)))

    def names_kept(self, message: NamesKept) -> None:
        """A frontend has the names of a predecessor of this scheduler; older ones are of no use."""
        if message.version >= self._version:
            self._version = message.version
            self._key_of = {**message.names, **self._key_of}
            self._taken[message.frontend] = message.version

    def aliases_taken(self, message: AliasesTaken) -> None:
        self._taken[message.frontend] = message.version

    def advance(self, now: float) -> None:
        """Go on with all commands whose wait is over. To be called before room is given away."""
        going_on = bool(self._running)
        while going_on:  # one that ends may be waited for by another
            before = len(self._running)
            self._running = [one for one in self._running if not self._ends(one, now)]
            going_on = len(self._running) < before

    def next_deadline(self) -> float | None:
        deadlines = (one.wait.deadline for one in self._running)
        return min((one for one in deadlines if one is not None), default=None)

    def _ends(self, running: _Running, now: float) -> bool:
        """Whether the command is over, after it has gone as far as it can."""
        failure: Failure | None = None
        try:
            while True:
                wait = running.wait
                if wait.holds():
                    running.wait = running.steps.send(now)
                elif wait.deadline is not None and now >= wait.deadline:
                    assert wait.late is not None
                    running.wait = running.steps.throw(Refused(wait.late))
                else:
                    return False
        except StopIteration:
            pass
        except Refused as refused:
            failure = refused.failure
        command = running.command
        self._send(command.frontend, AdminDone(command.command_id, failure))
        return True

    # --- the commands ---

    def _steps(self, command: AdminCommand) -> Steps:
        """One command after the other for each name, and for each adapter that has none."""
        subject: Hashable = command.name or command.adapter
        now = yield Wait(lambda: subject not in self._busy)
        self._busy.add(subject)
        try:
            match command.verb:
                case AdminVerb.LOAD:
                    yield from self._load(command, now)
                case AdminVerb.UNLOAD:
                    yield from self._unload(command.name)
                case AdminVerb.PIN:
                    yield from self._pin(command, now)
                case AdminVerb.UNPIN:
                    self._unpin(_adapter(command))
                case _:
                    assert_never(command.verb)
        finally:
            self._busy.remove(subject)

    def _load(self, command: AdminCommand, now: float) -> Steps:
        name, key = command.name, _adapter(command)
        if name in self._key_of and not command.in_place:
            raise Refused(failures.name_is_taken(name))
        if command.in_place:
            now = yield from self._retired([key])
        yield from self._arrived(command, now, keep=command.pinned)
        before = self._key_of.get(name)
        self._key_of[name] = key
        if before is not None and before not in self._key_of.values():
            self._adapters.unkeep(before)
        yield from self._told()

    def _unload(self, name: str) -> Steps:
        key = self._key_of.pop(name, None)
        if key is None:
            raise Refused(failures.no_such_name(name))
        yield from self._told()
        public = key.public
        if all(other.public != public for other in self._key_of.values()):
            known = {key: None, **dict.fromkeys(self._adapters), **dict.fromkeys(self._catalogue)}
            yield from self._retired([one for one in known if one.public == public])

    def _pin(self, command: AdminCommand, now: float) -> Steps:
        yield from self._arrived(command, now, keep=True)

    def _unpin(self, key: AdapterKey) -> None:
        if not self._adapters.unkeep(key):
            raise Refused(failures.not_pinned(key))

    # --- what they wait for ---

    def _told(self) -> Generator[Wait, float, float]:
        """All frontends have taken the names."""
        self._version = version = self._version + 1
        for frontend in range(len(self._taken)):
            self._send(frontend, Aliases(version, dict(self._key_of)))
        return (yield Wait(lambda: min(self._taken) >= version))

    def _retired(self, keys: list[AdapterKey]) -> Generator[Wait, float, float]:
        """Nothing is left of these adapters, in pool or arena."""
        for key in keys:
            self._adapters.retire(key)
        return (yield Wait(lambda: not any(map(self._adapters.is_retiring, keys))))

    def _arrived(
        self, command: AdminCommand, now: float, *, keep: bool
    ) -> Generator[Wait, float, None]:
        """The adapter is resident, and kept if that is wanted."""
        key = _adapter(command)
        want = self._adapters.want(key, command.adapter_token, now)
        try:
            yield Wait(
                lambda: want.failure is not None or self._adapters.has_arrived(key),
                now + self._load_seconds,
                failures.load_too_slow(key, self._load_seconds),
            )
            if want.failure is not None:
                raise Refused(want.failure)
            if keep:
                self._keep(key, command.adapter_token)
        finally:
            self._adapters.unwant(want)

    def _keep(self, key: AdapterKey, token: str | None) -> None:
        adapters = self._adapters
        if not adapters.keep(key, token, self._pinned_fraction):
            pinned = (adapters.kept, adapters.kept_bytes)
            raise Refused(failures.too_much_pinned(key, *pinned, self._pinned_fraction))


def _adapter(command: AdminCommand) -> AdapterKey:
    if command.adapter is None:
        raise ValueError(f"the command {command.verb} names no adapter")
    return command.adapter
