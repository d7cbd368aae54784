"""Which processes are targets: those that a rule fits, found when they come, change and go.

A rule that names a PID means the process that has it when the rules are read, and not one that gets the number later.
Changes of processes are told by the kernel or looked for (:mod:`mthp.linux.procevents`). Who changed is let settle and
looked into (:mod:`~mthp.daemon.discovery`), and becomes a target, stays one under another rule, or is let go. Every so
often all processes are listed, for what changes without an event.
"""

from __future__ import annotations

import os
import selectors
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mthp.daemon.discovery import SETTLE_SHARE, Nursery
from mthp.daemon.loop import Loop
from mthp.daemon.rules import Rule
from mthp.daemon.target import Target
from mthp.daemon.worker import Worker
from mthp.errors import MthpError
from mthp.linux.facts import FactsReader
from mthp.linux.process import Process, ProcStat
from mthp.linux.procevents import Changes, list_pids, open_events
from mthp.naming import ProcessFacts

NOBODY = 0
"""In place of a PID that no rule means."""

REMATCH_SECONDS = 10.0
"""Between two listings of all processes; what may change without an event is looked at anew then."""

TOLD_OF = frozenset(("pid", "comm", "exe"))
"""Properties whose change the kernel tells. The others change without an event: a process is put into another control
group, and the log of a container is linked after it has started."""


class Finder:
    """Finds processes for the worker, in the main thread.

    Args:
        worker: gets the targets; its environment's configuration has the rules.
        loop: waits for events of processes, and for the end of each target.
        say: tells a person what happened.

    Attributes:
        left_out: why processes that a rule fits are no targets, by how often.
    """

    left_out: Counter[str]

    def __init__(self, worker: Worker, loop: Loop, say: Callable[[str], None]) -> None:
        self.left_out: Counter[str] = Counter()
        self._worker, self._loop, self._say = worker, loop, say
        self._environment = worker.environment
        self._known: dict[int, int] = {}
        self._named: dict[int, int] = {}
        self._ancestors = _ancestors()
        self._facts = FactsReader()
        self._nursery = Nursery(self._tick)
        self._changes, hint = open_events()
        if hint:
            say(f"finding new processes by {self._changes.name}: {hint}")

    @property
    def means(self) -> str:
        """How new processes are found."""
        return self._changes.name

    @property
    def known(self) -> int:
        """How many processes were looked into."""
        return len(self._known)

    @property
    def next_due(self) -> float | None:
        """When there is a process to look into; None if nobody waits."""
        return self._nursery.next_due()

    def start(self) -> None:
        """Look into all processes, and into those that change from now on."""
        self._watch_processes()
        self._take_names()
        self._nursery.add(list_pids(), at_once=True)
        self.look_into()
        self._loop.every("rematch", REMATCH_SECONDS, self._rematch)

    def renew(self) -> None:
        """There are other rules now: look into all processes anew."""
        self._nursery.settle = self._tick
        self._known.clear()
        self._take_names()
        self._nursery.add(list_pids(), at_once=True)

    def _take_names(self) -> None:
        """Note who has the PIDs that rules name."""
        rules = self._environment.configuration.rules
        if hidden := self._facts.hidden(rules.properties):
            self._say(f"rules may fit nothing: {hidden}")
        self._named = {}
        for pid in sorted({pid for rule in rules.rules for pid in rule.match.pid}):
            facts = self._facts.read(pid, ())
            if facts is None:
                self._say(f"there is no process {pid}, which a rule names")
            else:
                self._named[pid] = facts.starttime

    def close(self) -> None:
        """Hear of no more changes."""
        self._changes.close()

    def _watch_processes(self) -> None:
        if self._changes.fileno() >= 0:
            self._loop.selector.register(self._changes.fileno(), selectors.EVENT_READ, self._processes_changed)
        else:
            self._loop.every("poll", self._tick, lambda: self._take(self._changes.changes()))

    @property
    def _tick(self) -> float:
        """Seconds for which events of processes are gathered."""
        return SETTLE_SHARE * self._environment.configuration.notice_ns / 1e9

    def _processes_changed(self, _events: int) -> None:
        """Take what came, and let more come for a while: one by one, each event would wake us."""
        self._loop.selector.unregister(self._changes.fileno())
        self._take(self._changes.changes())
        self._loop.after("events", self._tick, self._watch_processes)

    def _take(self, changes: Changes) -> None:
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
        """Look at all processes again that may have changed without an event: moved to another cgroup, above all."""
        pids = set(list_pids())
        for pid in self._known.keys() - pids:
            del self._known[pid]
        told_of = self._changes.fileno() >= 0 and self._environment.configuration.rules.properties <= TOLD_OF
        self._nursery.add(pids - {pid for pid, starttime in self._known.items() if told_of or starttime < 0})

    def look_into(self) -> None:
        """Look into processes that have settled."""
        rules = self._environment.configuration.rules
        for pid in self._nursery.take():
            facts = self._facts.read(pid, rules.properties)
            if facts is None:
                # A kernel thread stays one; one that is gone does no harm here.
                self._known[pid] = -1
                continue
            self._known[pid] = facts.starttime
            was_named = self._named.get(pid) == facts.starttime
            rule = rules.rule_for(facts if was_named else replace(facts, pid=NOBODY))
            if rule is not None and (rule.deny or pid in self._ancestors):
                rule = None
            self._match(facts, rule)

    def _match(self, facts: ProcessFacts, rule: Rule | None) -> None:
        """Have `rule` hold for a process from now on; None to leave it alone."""
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
            self.left_out[error.message.replace(str(facts.pid), "PID")] += 1
            return
        if process.starttime != facts.starttime:
            process.close()
            self._nursery.add([facts.pid])
            return
        target = Target(process, facts, rule, self._environment)
        pid = facts.pid
        self._loop.selector.register(process.pidfd, selectors.EVENT_READ, lambda _events: self._forget(pid))
        self._worker.add(target)
        self._environment.event("target", pid=pid, comm=facts.comm, rule=rule.name)

    def _forget(self, pid: int) -> None:
        """It is gone, or to be left alone."""
        target = self._worker.targets.get(pid)
        if target is None:
            return
        # Before it is closed: its number may soon be that of another file.
        self._loop.selector.unregister(target.process.pidfd)
        alive = target.process.is_alive()
        self._worker.drop(pid)
        self._environment.event("left" if alive else "gone", pid=pid, comm=target.facts.comm)


def _ancestors() -> frozenset[int]:
    """This process and those that it descends from, which are left alone: we would wait for ourselves."""
    found: list[int] = []
    pid = os.getpid()
    while pid > 0:
        found.append(pid)
        try:
            pid = ProcStat.parse(Path(f"/proc/{pid}/stat").read_bytes()).ppid
        except OSError:
            break
    return frozenset(found)
