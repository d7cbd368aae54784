"""The choice of targets: processes that fit a rule, found when they start, change and exit.

Changes of processes come from the kernel's events or from lists (:mod:`mthp.linux.procevents`). A changed process
settles and is read, and becomes a target, stays one under another rule, or stops being one. Periodically all processes
are listed, for changes without an event.

A process that was just forked is about to become another program, and most exit a moment later. So it is left alone for
a while first (:class:`Nursery`); a process that exits meanwhile is never read. Only :data:`AT_A_TIME` are read at once,
so that a storm of new processes delays others and never the daemon.
"""

from __future__ import annotations

import os
import selectors
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import replace

from mthp.daemon.loop import Loop
from mthp.daemon.rules import Rule
from mthp.daemon.target import Target
from mthp.daemon.worker import Worker
from mthp.errors import MthpError
from mthp.linux.facts import FactsReader
from mthp.linux.process import Process, ancestors, list_pids
from mthp.linux.procevents import Changes, open_events
from mthp.naming import ProcessFacts
from mthp.pacing import Clock

NO_PID = 0
"""Stands in place of a PID that no rule means."""

REMATCH_SECONDS = 10.0
"""Seconds between two listings of all processes, for changes without an event."""

REPORTED = frozenset(("pid", "comm", "exe"))
"""Properties with changes that are kernel events. The others change without one: a process is moved to another control
group, and the log of a container is linked after it has started.
"""

SERVICE = frozenset(("pod", "container", "unit"))
"""Properties that name the service of a process."""


class Finder:
    """Finds processes for the worker, in the main thread.

    Args:
        worker: receives the targets; its environment's configuration has the rules.
        loop: waits for events of processes, and for the end of each target.

    Attributes:
        left_out: reasons for which processes that fit a rule are not targets, with the number of times.
    """

    left_out: Counter[str]

    def __init__(self, worker: Worker, loop: Loop) -> None:
        self.left_out: Counter[str] = Counter()
        self._worker, self._loop, self._environment = worker, loop, worker.environment
        self._say = worker.environment.say
        self._known: dict[int, int] = {}
        self._named: dict[int, int] = {}
        # Left alone, because the daemon would wait for itself.
        self._depends_on = frozenset((os.getpid(), *ancestors()))
        self._facts = FactsReader()
        self._nursery = Nursery(self._tick)
        self._changes, hint = open_events()
        if hint:
            self._say(f"finding new processes by {self._changes.name}: {hint}")

    @property
    def means(self) -> str:
        """The name of the way in which new processes are found."""
        return self._changes.name

    @property
    def known(self) -> int:
        """The number of processes that were read."""
        return len(self._known)

    @property
    def next_due(self) -> float | None:
        """When the next process has settled; None if none waits."""
        return self._nursery.next_due()

    def start(self) -> None:
        """Read all processes, and from now on every process that changes."""
        self._watch_processes()
        self._take_names()
        self._nursery.add(list_pids(), at_once=True)
        self.look_into()
        self._loop.every("rematch", REMATCH_SECONDS, self._rematch)

    def renew(self) -> None:
        """Read all processes again, because the rules have changed."""
        self._nursery.settle = self._tick
        self._known.clear()
        self._take_names()
        self._nursery.add(list_pids(), at_once=True)

    def _take_names(self) -> None:
        """Note which processes have the PIDs that rules name."""
        rules = self._environment.configuration.rules
        if hidden := self._facts.hidden(rules.properties):
            self._say(f"rules may match nothing: {hidden}")
        self._named = {}
        for pid in sorted({pid for rule in rules.rules for pid in rule.match.pid}):
            facts = self._facts.read(pid, ())
            if facts is None:
                self._say(f"process {pid} does not exist, but a rule names it")
            else:
                self._named[pid] = facts.starttime

    def close(self) -> None:
        """Stop receiving changes."""
        self._changes.close()

    def _watch_processes(self) -> None:
        if self._changes.fileno() >= 0:
            self._loop.selector.register(self._changes.fileno(), selectors.EVENT_READ, self._processes_changed)
        else:
            self._loop.every("poll", self._tick, lambda: self._take(self._changes.changes()))

    @property
    def _tick(self) -> float:
        """The seconds for which events of processes are gathered."""
        return SETTLE_SHARE * self._environment.configuration.notice_ns / 1e9

    def _processes_changed(self, _events: int) -> None:
        """Take the pending events, and gather the next ones, because each single event would wake the daemon."""
        self._loop.selector.unregister(self._changes.fileno())
        self._take(self._changes.changes())
        self._loop.after("events", self._tick, self._watch_processes)

    def _take(self, changes: Changes) -> None:
        # Those that are gone first: a PID may have been used again meanwhile.
        self._nursery.drop(changes.gone)
        for pid in changes.gone:
            self._known.pop(pid, None)
        self._worker.forked(changes)
        self._nursery.add(changes.born)
        self._nursery.add(changes.changed)
        if changes.lost:
            self._say("events of processes were lost: listing all of them")
            self._nursery.add(list_pids())

    def _rematch(self) -> None:
        """Read all processes that may have changed without an event: moved to another cgroup, above all."""
        pids = set(list_pids())
        # Their ends may have been among lost events.
        for pid in self._known.keys() - pids:
            del self._known[pid]
        reported = self._changes.fileno() >= 0 and self._environment.configuration.rules.properties <= REPORTED
        self._nursery.add(pids - {pid for pid, starttime in self._known.items() if reported or starttime < 0})

    def look_into(self) -> None:
        """Read processes that have settled, and match them."""
        rules = self._environment.configuration.rules
        for pid in self._nursery.take():
            facts = self._facts.read(pid, rules.properties)
            if facts is None:
                # A kernel thread remains one, and an entry for a process that is gone does no harm.
                self._known[pid] = -1
                continue
            self._known[pid] = facts.starttime
            # A rule that names a PID means the process that had it when the rules were read, and not a later one.
            was_named = self._named.get(pid) == facts.starttime
            rule = rules.rule_for(facts if was_named else replace(facts, pid=NO_PID))
            if rule is not None and (rule.deny or pid in self._depends_on):
                rule = None
            self._match(facts if rule is None else self._with_service(facts), rule)

    def _with_service(self, facts: ProcessFacts) -> ProcessFacts:
        """Return `facts` with those that name the service too, whether or not a rule names one of them."""
        found = self._facts.read(facts.pid, self._environment.configuration.rules.properties | SERVICE)
        return found if found is not None and found.starttime == facts.starttime else facts

    def _match(self, facts: ProcessFacts, rule: Rule | None) -> None:
        """Apply `rule` to a process from now on; None to leave it alone."""
        target = self._worker.targets.get(facts.pid)
        if target is not None and target.facts.starttime != facts.starttime:
            self._forget(facts.pid)
            target = None
        if rule is None:
            if target is not None:
                self._forget(facts.pid)
        elif target is None:
            self._begin(facts, rule)
        elif (facts, rule) != (target.facts, target.rule):
            self._worker.renew(target, facts, rule)

    def _begin(self, facts: ProcessFacts, rule: Rule) -> None:
        try:
            process = Process(facts.pid)
        except MthpError as error:
            # Without the PID, so that equal reasons are counted together.
            self.left_out[error.message.replace(str(facts.pid), "PID")] += 1
            return
        # The PID was used again since the facts were read.
        if process.starttime != facts.starttime:
            process.close()
            self._nursery.add([facts.pid])
            return
        target = Target(process, facts, rule, self._environment)
        pid = facts.pid
        self._loop.selector.register(process.pidfd, selectors.EVENT_READ, lambda _events: self._forget(pid))
        self._worker.add(target)
        self._environment.event_of(facts, "target", rule=rule.name)

    def _forget(self, pid: int) -> None:
        """Drop the target of a process that is gone, or to be left alone."""
        target = self._worker.targets.get(pid)
        if target is None:
            return
        # Before the pidfd is closed, because its number may soon be that of another file.
        self._loop.selector.unregister(target.process.pidfd)
        alive = target.process.is_alive()
        self._worker.drop(target)
        self._environment.event_of(target.facts, "left" if alive else "gone")


AT_A_TIME = 128
"""Processes read before the daemon turns to its other events."""

SETTLE_SHARE = 0.4
"""The part of the noticing time for which a new process is left alone."""


class Nursery:
    """New processes that wait to be read.

    Args:
        settle: seconds for which each is left alone.
    """

    def __init__(self, settle: float, clock: Clock = time.monotonic) -> None:
        self.settle = settle
        self._clock = clock
        self._due: dict[int, float] = {}
        self._queue: deque[tuple[float, int]] = deque()

    def add(self, pids: Iterable[int], *, at_once: bool = False) -> None:
        """Add processes. One that waits already starts waiting again, because it has changed."""
        due = self._clock() + (0 if at_once else self.settle)
        for pid in pids:
            self._due[pid] = due
            self._queue.append((due, pid))

    def drop(self, pids: Iterable[int]) -> None:
        """Remove processes that are gone."""
        for pid in pids:
            self._due.pop(pid, None)

    def next_due(self) -> float | None:
        """Return when the next process has settled; None if none waits."""
        # Processes that were added again, or are gone, have left entries behind.
        while self._queue and self._due.get(self._queue[0][1]) != self._queue[0][0]:
            self._queue.popleft()
        return self._queue[0][0] if self._queue else None

    def take(self) -> list[int]:
        """Return the processes that have settled, `AT_A_TIME` at most."""
        taken: list[int] = []
        now = self._clock()
        while len(taken) < AT_A_TIME and (due := self.next_due()) is not None and due <= now:
            _, pid = self._queue.popleft()
            del self._due[pid]
            taken.append(pid)
        return taken

    def __len__(self) -> int:
        return len(self._due)
