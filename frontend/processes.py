"""What the other processes have told of themselves: whether they are ready, facts, statistics."""

from pipeline.config import Settings
from pipeline.messages import ProcessReady, Stats
from pipeline.metrics import Families

Fact = str | int | float | None


class Processes:
    """The latest word of each process."""

    def __init__(self, settings: Settings) -> None:
        self._awaited = {("scheduler", 0), ("gpu_worker", 0), ("adapter_loader", 0)} | {
            ("tokenizer_workers", index) for index in range(settings.tokenizer_workers)
        }
        self._facts: dict[tuple[str, int], dict[str, Fact]] = {}
        self._families: dict[tuple[str, int], Families] = {}
        self._down: dict[tuple[str, int], str] = {}  # that were ready and are started again: why

    def ready(self, message: ProcessReady) -> bool:
        """Take note of it; whether it was the last one that was waited for."""
        awaited = bool(self.waits_for())
        self._down.pop((message.process, message.index), None)
        self._facts[(message.process, message.index)] = message.facts
        return awaited and not self.waits_for()

    def died(self, process: str, index: int, cause: str = "") -> None:
        """It will be ready again; what is known of it stays until then."""
        peer = (process, index)
        if peer in self._awaited:
            self._down[peer] = cause or self._down.get(peer, "")

    def waits_for(self) -> str:
        """What is not ready, yet or again, in words; empty if all are."""
        absent = (self._awaited - self._facts.keys()) | self._down.keys()
        if not absent:
            return ""
        names = sorted({process for process, _ in absent})
        died = [f"{process} died: {why}" for (process, _), why in self._down.items() if why]
        return "; ".join((f"waiting for {', '.join(names)}", *died))

    def stats(self, message: Stats) -> None:
        self._families[(message.process, message.index)] = message.families

    def missing(self) -> list[str]:
        """The processes that were never ready: until all have been, nobody is let in."""
        return sorted({process for process, _ in self._awaited - self._facts.keys()})

    def fact(self, process: str, name: str) -> Fact:
        """What the first process of that name says; None when it says nothing."""
        return self._facts.get((process, 0), {}).get(name)

    def facts(self) -> dict[str, dict[str, Fact]]:
        """All facts, by process: `name`, or `name.index` where there are several."""
        return {
            f"{process}.{index}" if index else process: facts
            for (process, index), facts in sorted(self._facts.items())
        }

    def families(self) -> dict[tuple[str, int], Families]:
        """The metrics of each process, as they were when it last reported."""
        return dict(self._families)
