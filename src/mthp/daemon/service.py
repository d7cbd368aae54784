"""The daemon: one event loop in the main thread, one worker for the targets.

The main thread waits for whatever comes first: events of processes, the end of a target (its pidfd becomes readable), a
client of the socket, a signal, a timer. None of what it does takes long, so a signal is obeyed at once whatever the
worker is at. The worker owns the targets' memory and all that is done there (:mod:`mthp.daemon.worker`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mthp.addrspace import AddressSpace
from mthp.daemon.configuration import Configuration
from mthp.daemon.control import NAME as SOCKET_NAME
from mthp.daemon.control import ControlSocket
from mthp.daemon.counters import Counters
from mthp.daemon.discovery import SETTLE_SHARE, Nursery, read_facts
from mthp.daemon.environment import Environment
from mthp.daemon.eventlog import EventLog
from mthp.daemon.lock import DaemonLock
from mthp.daemon.notify import Notifier
from mthp.daemon.pacing import (
    BYTES_BURST_SECONDS,
    Budget,
    CpuBudget,
    FreeFolios,
    MemoryPressure,
    memory_used,
    raise_open_files_limit,
)
from mthp.daemon.rules import ProcessFacts, Rule
from mthp.daemon.system import SystemKnobs
from mthp.daemon.target import Target
from mthp.daemon.worker import Worker
from mthp.errors import MthpError, NotPermittedError, UnsupportedError, UsageError
from mthp.linux.live import open_live
from mthp.linux.mover.journal import LOCK_NAME, SwitchJournal, default_root
from mthp.linux.process import Process, ProcStat
from mthp.linux.procevents import Changes, list_pids, open_events
from mthp.linux.rights import CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_PTRACE, Rights
from mthp.linux.sysfs import ThpSysfs

STOP_SECONDS = 0.8
"""For so long the piece of work at hand is waited for when the daemon is told to end."""

TOUCHING_SECONDS = 8.0
"""And for so long if it is changing a target, so that switches and threads are left as they were."""

STUCK_SECONDS = 60.0
"""A worker that was not seen for so long gives no sign of life any more, for the watchdog to see."""

RESTORE_SECONDS = 5.0
"""Between two tries to put back what a killed run has left."""

REMATCH_SECONDS = 10.0
"""Between two listings of all processes; what may change without an event is looked at anew then."""

NEEDED = {
    CAP_SYS_PTRACE: "to look at other users' processes and to stop their threads",
    CAP_SYS_ADMIN: "to see page frames and so the orders of folios",
    CAP_SYS_NICE: "for MADV_COLLAPSE in other processes",
}
"""The capabilities without which there is nothing to do, and what each is for."""

_Handler = Callable[[int], None]


@dataclass
class Options:
    """What the daemon is started with.

    Attributes:
        load: reads the configuration: at the start, and at every SIGHUP.
        run_dir: directory of the lock and of the socket.
        events: file of the event log, over the configuration's.
        metrics: (host, port) to serve metrics at, over the configuration's.
        say: tells a person what happens.
    """

    load: Callable[[], Configuration]
    run_dir: Path
    say: Callable[[str], None]
    events: Path | None = None
    metrics: tuple[str, int] | None = None


def check_rights(rights: Rights | None = None) -> None:
    """Do nothing if these rights suffice.

    Raises:
        NotPermittedError: a capability is missing; says which, and what for.
    """
    rights = rights or Rights.read(Path("/proc/self"))
    missing = [(capability, use) for capability, use in NEEDED.items() if not rights.has(capability)]
    if missing:
        lines = [f"{rights.how_to_have(capability)}: {use}" for capability, use in missing]
        raise NotPermittedError("the daemon lacks rights", help="\n".join(lines))


class Daemon:
    """The running daemon.

    Args:
        options: what it is started with.

    Raises:
        UsageError: a configuration that cannot be; a socket or a port that is taken; a log that cannot be written.
        MthpError: another daemon is running.
        NotPermittedError, UnsupportedError: these rights, or this kernel, do not suffice.
    """

    def __init__(self, options: Options) -> None:
        self._options, self._say = options, options.say
        self._started = time.monotonic()
        self._restart_needed: set[str] = set()
        self._left_out: Counter[str] = Counter()
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._stopping = False
        self._known: dict[int, int] = {}
        self._reloads = self._refused_reloads = 0
        self._undo = contextlib.ExitStack()
        self._notifier = Notifier()
        try:
            self._set_up()
        except BaseException:
            self._undo.close()
            raise

    def _set_up(self) -> None:
        check_rights()
        sysfs = ThpSysfs()
        if not sysfs.exists:
            raise UnsupportedError("this kernel has no THP", help="it takes CONFIG_TRANSPARENT_HUGEPAGE")
        self.configuration = self._options.load()
        _make_directory(self._options.run_dir)
        lock = DaemonLock(self._options.run_dir)
        self._undo.callback(lock.close)
        self._restore()
        raise_open_files_limit()
        geometry = sysfs.geometry()
        self.geometry = geometry
        self._events = self._open_events()
        self.knobs = SystemKnobs(sysfs, geometry, default_root() / LOCK_NAME)
        self._undo.callback(self.knobs.close)
        configuration = self.configuration
        rate = configuration.bytes_per_second
        self.environment = Environment(
            geometry=geometry,
            configuration=configuration,
            switches=configuration.switches_over(self.knobs.switches),
            tunables=configuration.tunables_over(self.knobs.tunables, geometry),
            free=FreeFolios(),
            total=Counters(),
            bytes=Budget(rate, BYTES_BURST_SECONDS * (rate or 0)),
            opened=self._opened,
            event=self._event,
        )
        self.worker = Worker(
            self.environment,
            self.knobs,
            MemoryPressure(configuration.memory_pressure),
            CpuBudget(configuration.cpu),
            self._say,
        )
        self._selector = selectors.DefaultSelector()
        self._undo.callback(self._selector.close)
        self._changes, hint = open_events()
        self._undo.callback(self._changes.close)
        if hint:
            self._say(f"finding new processes by {self._changes.name}: {hint}")
        self._control = ControlSocket(self._options.run_dir / SOCKET_NAME, self._selector, self._answer)
        self._undo.callback(self._control.close)
        self._serve_metrics()
        self._ancestors = _ancestors()
        self._nursery = Nursery(SETTLE_SHARE * self._notice)

    @property
    def _notice(self) -> float:
        return self.configuration.notice_ns / 1e9

    def _restore(self) -> None:
        """Put back the switches that a run which was killed has left changed; later, while another run is at work."""
        try:
            restored = SwitchJournal().restore_after_crash()
        except NotPermittedError:
            raise
        except MthpError as error:
            self._say(f"switches that a killed mthp may have left are looked at later: {error.message}")
            self._after("restore", RESTORE_SECONDS, self._restore)
            return
        for switch in restored:
            what = f"put back to {switch.was}" if switch.put_back else f"left at {switch.found}: changed since"
            self._say(f"{switch.switch}, which a killed mthp had changed: {what}")

    def _open_events(self) -> EventLog | None:
        path = self._options.events or self.configuration.events
        if path is None:
            return None
        log = EventLog(path, self._say)
        self._undo.callback(log.close)
        return log

    def _serve_metrics(self) -> None:
        endpoint = self._options.metrics or self.configuration.metrics
        if endpoint is None:
            return
        from mthp.daemon.metrics import serve

        server = serve(self, *endpoint)
        self._undo.callback(server.close)
        self._say(f"metrics: {server.url}")

    def _event(self, event: str, **values: Any) -> None:
        if self._events is not None:
            self._events.write(event, **values)

    def _opened(self, pid: int) -> AddressSpace:
        space = open_live(pid)
        target = self.worker.targets.get(pid)
        if target is not None and space.process.starttime != target.process.starttime:
            space.close()
            target.process.check_alive()
        return space

    # The loop.

    def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        with self._undo, self._signals():
            self.worker.start()
            self._watch_processes()
            self._nursery.add(list_pids(), at_once=True)
            self._look_into()
            self._every("rematch", REMATCH_SECONDS, self._rematch)
            if self._notifier.watchdog:
                self._every("watchdog", self._notifier.watchdog, self._sign_of_life)
            self._event("start", pid=os.getpid(), rules=len(self.configuration.rules.rules))
            self._notifier.ready(self._status_line())
            self._say(f"process {os.getpid()}: {self._status_line()}; new processes by {self._changes.name}")
            while not self._stopping:
                self._once()
            self._end()

    def _once(self) -> None:
        """Wait for what comes first, and see to it."""
        timers = [at for at, _ in self._timers.values()]
        if (due := self._nursery.next_due()) is not None:
            timers.append(due)
        now = time.monotonic()
        timeout = max(min(timers) - now, 0) if timers else None
        for key, events in self._selector.select(timeout):
            key.data(events)
        now = time.monotonic()
        for name, (at, act) in list(self._timers.items()):
            if at <= now:
                if self._timers.get(name) == (at, act):
                    del self._timers[name]
                act()
        self._look_into()

    def _after(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        self._timers[name] = time.monotonic() + seconds, act

    def _every(self, name: str, seconds: float, act: Callable[[], None]) -> None:
        def again() -> None:
            self._after(name, seconds, again)
            act()

        self._after(name, seconds, again)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Have signals wake the loop."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        wanted: list[int] = []

        def note(number: int, _frame: FrameType | None) -> None:
            wanted.append(number)

        def obey(_events: int) -> None:
            with contextlib.suppress(BlockingIOError):
                ours.recv(64)
            while wanted:
                self._obey(wanted.pop(0))

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, note) for number in numbers}
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._selector.register(ours, selectors.EVENT_READ, obey)
        try:
            yield
        finally:
            self._selector.unregister(ours)
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()

    def _obey(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.reload()
        else:
            self._stopping = True

    def _sign_of_life(self) -> None:
        if time.monotonic() - self.worker.beat < STUCK_SECONDS:
            self._notifier.alive(self._status_line())

    def _status_line(self) -> str:
        state = "paused" if self.worker.paused else "resting" if self.worker.resting else "working"
        return f"{state}, {len(self.worker.targets)} targets, {self.environment.total.collapsed.total()} folios made"

    def _end(self) -> None:
        self._notifier.stopping()
        in_time = self.worker.stop(STOP_SECONDS, TOUCHING_SECONDS)
        self._event("stop", in_time=in_time)
        self._say("ended" if in_time else "ended in the middle of reading a process, which that does not harm")

    # Processes.

    def _watch_processes(self) -> None:
        if self._changes.fileno() >= 0:
            self._selector.register(self._changes.fileno(), selectors.EVENT_READ, self._processes_changed)
        else:
            self._every("poll", self._tick, lambda: self._take(self._changes.changes()))

    @property
    def _tick(self) -> float:
        """Seconds for which events of processes are gathered."""
        return SETTLE_SHARE * self._notice

    def _processes_changed(self, _events: int) -> None:
        """Take what came, and let more come for a while: one by one, each event would wake us."""
        self._selector.unregister(self._changes.fileno())
        self._take(self._changes.changes())
        self._after("events", self._tick, self._watch_processes)

    def _take(self, changes: Changes) -> None:
        self._nursery.drop(changes.gone)
        for pid in changes.gone:
            self._known.pop(pid, None)
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
        told_of = self._changes.fileno() >= 0 and not self.configuration.rules.properties & {"cgroup", "uid"}
        self._nursery.add(pids - {pid for pid, starttime in self._known.items() if told_of or starttime < 0})

    def _look_into(self) -> None:
        """Look into processes that have settled."""
        rules = self.configuration.rules
        for pid in self._nursery.take():
            facts = read_facts(pid, rules.properties)
            if facts is None:
                # A kernel thread stays one; one that is gone does no harm here.
                self._known[pid] = -1
                continue
            self._known[pid] = facts.starttime
            rule = rules.rule_for(facts)
            if rule is not None and (rule.deny or pid in self._ancestors):
                rule = None
            self._match(facts, rule)

    def _match(self, facts: ProcessFacts, rule: Rule | None) -> None:
        """Have `rule` hold for a process from now on; None to leave it alone."""
        target = self.worker.targets.get(facts.pid)
        if target is not None and target.facts.starttime != facts.starttime:
            self._forget(facts.pid)
            target = None
        if rule is None:
            if target is not None:
                self._forget(facts.pid)
        elif target is None:
            self._begin(facts, rule)
        elif (facts, rule) != (target.facts, target.rule):
            self.worker.renew(target, facts, rule)

    def _begin(self, facts: ProcessFacts, rule: Rule) -> None:
        try:
            process = Process(facts.pid)
        except MthpError as error:
            self._left_out[error.message.replace(str(facts.pid), "PID")] += 1
            return
        if process.starttime != facts.starttime:
            process.close()
            self._nursery.add([facts.pid])
            return
        target = Target(process, facts, rule, self.environment)
        pid = facts.pid
        self._selector.register(process.pidfd, selectors.EVENT_READ, lambda _events: self._forget(pid))
        self.worker.add(target)
        self._event("target", pid=pid, comm=facts.comm, rule=rule.name)

    def _forget(self, pid: int) -> None:
        """It is gone, or to be left alone."""
        target = self.worker.targets.get(pid)
        if target is None:
            return
        # Before it is closed: its number may soon be that of another file.
        self._selector.unregister(target.process.pidfd)
        alive = target.process.is_alive()
        self.worker.drop(pid)
        self._event("left" if alive else "gone", pid=pid, comm=target.facts.comm)

    # What it is told.

    def reload(self) -> None:
        """Read the configuration again; if it cannot be, the old one stays."""
        self._notifier.reloading()
        if self._events is not None:
            self._events.reopen()
        try:
            configuration = self._options.load()
        except MthpError as error:
            self._refused_reloads += 1
            self._say(f"the new configuration is refused, the old one stays: {error.message}")
            self._event("reload_refused", error=error.message)
            self._notifier.ready(self._status_line())
            return
        self._reloads += 1
        for name in ("metrics", "events"):
            if getattr(configuration, name) != getattr(self.configuration, name):
                self._say(f"{name} is another now: that takes a restart")
        self.configuration = configuration
        self._nursery.settle = SETTLE_SHARE * self._notice
        self.worker.configure(configuration)
        self._known.clear()
        self._nursery.add(list_pids(), at_once=True)
        self._say(f"configuration read again: {len(configuration.rules.rules)} rules")
        self._event("reload", rules=len(configuration.rules.rules))
        self._notifier.ready(self._status_line())

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        command = request.get("command")
        if command == "status":
            return self.summary()
        if command in ("pause", "resume"):
            self.worker.pause(command == "pause")
            self._event(command)
            self._say("paused" if command == "pause" else "going on")
            return {"paused": self.worker.paused, "busy": self.worker.busy}
        raise UsageError(f"unknown command {command!r}", help="use status, pause or resume")

    def summary(self) -> dict[str, Any]:
        """All that `mthp status` tells."""
        now = time.monotonic()
        times = os.times()
        targets = list(self.worker.targets.values())
        return {
            "pid": os.getpid(),
            "uptime": now - self._started,
            "paused": self.worker.paused,
            "busy": self.worker.busy,
            "resting": self.worker.resting,
            "memory_pressure": self.worker.pressure,
            "cpu_seconds": times.user + times.system,
            "cpu_limit": self.configuration.cpu,
            "memory_bytes": memory_used(),
            "finds_processes_by": self._changes.name,
            "processes_known": len(self._known),
            "reloads": self._reloads,
            "refused_reloads": self._refused_reloads,
            "orders_refused": [self.geometry.label(order) for order in self.environment.free.exhausted()],
            "switches": {
                "enabled": self.environment.switches.enabled,
                "sizes": {self.geometry.label(order): word for order, word in self.environment.switches.sizes.items()},
            },
            "left_out": dict(self._left_out),
            "counters": self.environment.total.summary(self.geometry),
            "targets": [target.summary(now) for target in targets],
        }


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


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise NotPermittedError(
            f"{path}: {error.strerror}", help="run as root, or give a directory of yours with --run-dir"
        ) from error
