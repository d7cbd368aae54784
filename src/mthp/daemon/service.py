"""The daemon: one event loop in the main thread, one worker for the targets.

The main thread waits for the first of events of processes, the end of a target (its pidfd becomes readable), a client
of the socket, a signal, a timer. All its actions are short, so a signal takes effect at once whatever the worker does.
The worker owns the targets' memory and all operations on it (:mod:`mthp.daemon.worker`).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

from mthp.addrspace import AddressSpace
from mthp.daemon.config import Configuration
from mthp.daemon.environment import Environment
from mthp.daemon.ipc import SOCKET_NAME, ControlSocket, DaemonLock
from mthp.daemon.kernel_settings import Keeping, SystemKnobs
from mthp.daemon.loop import Loop
from mthp.daemon.pressure import MemoryPressure, memory_used, raise_open_files_limit
from mthp.daemon.processes import Finder
from mthp.daemon.systemd import CAPABILITIES, Notifier
from mthp.daemon.target import Target
from mthp.daemon.telemetry import EventLog
from mthp.daemon.worker import Worker
from mthp.errors import MthpError, NotPermittedError, UnsupportedError, UsageError
from mthp.geometry import Geometry
from mthp.linux.journal.store import LOCK_NAME, default_root
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.live import open_live
from mthp.linux.rights import CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_PTRACE, CAPABILITY_NAMES, Rights
from mthp.linux.sysfs import ThpSysfs
from mthp.objects import to_object
from mthp.pacing import CpuBudget
from mthp.text import numbered

STOP_SECONDS = 0.8
"""Seconds that the daemon waits for the current piece of work before it ends."""

TOUCHING_SECONDS = 8.0
"""The same while the worker changes a target, so that switches and threads are left as they were."""

STUCK_SECONDS = 60.0
"""Seconds without progress of the worker after which the daemon sends no sign of life to the watchdog."""

RESTORE_SECONDS = 5.0
"""Seconds between two tries to put back switches that a killed run has left."""

NEEDED = (CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_SYS_NICE)
"""The required capabilities; :data:`~mthp.daemon.systemd.CAPABILITIES` has the purpose of each."""


def check_rights() -> None:
    """Check that this process has the required capabilities.

    Raises:
        NotPermittedError: a capability is missing; names it and its purpose.
    """
    rights = Rights.read(Path("/proc/self"))
    missing = [capability for capability in NEEDED if not rights.has(capability)]
    if missing:
        lines = [f"{rights.how_to_have(one)}: {CAPABILITIES[CAPABILITY_NAMES[one]]}" for one in missing]
        raise NotPermittedError("the daemon lacks rights", help="\n".join(lines))


class Daemon:
    """The running daemon.

    Args:
        load: reads the configuration: at the start, and at every SIGHUP.
        run_dir: directory of the lock and of the socket.

    Raises:
        UsageError: the configuration is invalid; a socket or a port is taken; a log cannot be written.
        MthpError: another daemon is running.
        NotPermittedError, UnsupportedError: these rights, or this kernel, do not suffice.
    """

    JSON = (
        "pid uptime_seconds *worker resting=worker.pressure.resting memory_pressure=worker.pressure.share"
        " cpu_seconds cpu=environment.configuration.cpu"
        " keep_max_ptes_none=environment.configuration.keep_max_ptes_none"
        " resident_memory_bytes finds_processes_by=finder.means processes_known=finder.known"
        " reloads refused_reloads orders_refused switches=environment.switches left_out=finder.left_out"
        " counters=environment.total targets"
    )
    """Output of `mthp status`."""

    environment: Environment
    worker: Worker
    finder: Finder
    geometry: Geometry
    pid: int
    reloads: int
    refused_reloads: int

    def __init__(
        self, load: Callable[[], Configuration], run_dir: Path, version: str, say: Callable[[str], None]
    ) -> None:
        self._load, self._say = load, say
        self._started = time.monotonic()
        self._stopping = False
        self.pid = os.getpid()
        self.reloads = self.refused_reloads = 0
        self._events: EventLog | None = None
        self._undo = contextlib.ExitStack()
        self._loop = self._undo.enter_context(closing(Loop()))
        self._notifier = Notifier()
        try:
            self._set_up(run_dir, version)
        except BaseException:
            self._undo.close()
            raise

    def _set_up(self, run_dir: Path, version: str) -> None:
        check_rights()
        sysfs = ThpSysfs()
        if not sysfs.exists:
            raise UnsupportedError("this kernel has no THP", help="it takes CONFIG_TRANSPARENT_HUGEPAGE")
        configuration = self._load()
        # Closed in reverse order, also if a later part cannot begin.
        begin = self._undo.enter_context
        begin(closing(DaemonLock(run_dir)))
        self._restore()
        raise_open_files_limit()
        self.geometry = geometry = sysfs.geometry()
        if configuration.events is not None:
            self._events = begin(closing(EventLog(configuration.events, self._say)))
        knobs = begin(closing(SystemKnobs(sysfs, geometry, default_root() / LOCK_NAME)))
        self.environment = Environment(
            geometry=geometry,
            configuration=configuration,
            switches=configuration.switches_over(knobs.switches),
            tunables=configuration.tunables_over(knobs.tunables, geometry),
            opened=self._opened,
            event=self._event,
            say=self._say,
        )
        self.worker = Worker(
            self.environment,
            knobs,
            MemoryPressure(configuration.max_memory_pressure),
            CpuBudget(configuration.cpu),
            # The main thread ends as for an operator's signal; run() then raises an error.
            died=lambda: signal.raise_signal(signal.SIGTERM),
        )
        self._keeping = begin(closing(Keeping(knobs, self._loop, self._say)))
        self._keeping.keep(configuration.keep_max_ptes_none)
        self.finder = begin(closing(Finder(self.worker, self._loop)))
        begin(closing(ControlSocket(run_dir / SOCKET_NAME, self._loop.selector, self._answer)))
        if configuration.metrics is not None:
            from mthp.daemon.exporter import MetricsServer

            server = begin(closing(MetricsServer(self.environment, self.worker, *configuration.metrics, version)))
            self._say(f"metrics: {server.url}")

    def _restore(self) -> None:
        """Put back the switches that a killed run has left changed; later, while another run is at work."""
        try:
            restored = SwitchJournal.restore_all()
        except NotPermittedError:
            raise
        except MthpError as error:
            self._say(f"switches that a killed mthp may have left are put back later: {error.message}")
            self._loop.after("restore", RESTORE_SECONDS, self._restore)
            return
        for each in restored:
            self._say(f"a killed mthp had changed a switch: {each}")

    def _event(self, event: str, **values: Any) -> None:
        if self._events is not None:
            self._events.write(event, **values)

    def _opened(self, pid: int) -> AddressSpace:
        space = open_live(pid)
        target = self.worker.targets.get(pid)
        # The PID is that of another process by now, which no rule was matched with.
        if target is not None and space.process.starttime != target.process.starttime:
            space.close()
            target.process.check_alive()
        return space

    # The loop.

    def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises:
            MthpError: an internal error stopped the daemon.
        """
        with self._undo, self._signals():
            # The budget leaves this thread out: it does what others cause, which must not stop the work.
            self.worker.cpu.leave_out()
            self.worker.start()
            self.finder.start()
            if self._notifier.watchdog:
                self._loop.every("watchdog", self._notifier.watchdog, self._sign_of_life)
            self._event("start", pid=self.pid, rules=len(self.environment.configuration.rules.rules))
            self._notifier.send("READY=1", f"STATUS={self._status_line()}")
            self._say(f"process {self.pid}: {self._status_line()}; new processes by {self.finder.means}")
            while not self._stopping:
                self._loop.once(self.finder.next_due)
                self.finder.look_into()
            self._end()
        if self.worker.failed:
            raise MthpError("the daemon stopped because of an internal error", help="please report it, with the log")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Have signals wake the loop."""
        # Python retries select(2) after a handler has run (PEP 475); a byte at this socket ends the wait.
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

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTSTP)
        before = {number: signal.signal(number, note) for number in numbers}
        # A full buffer wakes the loop as well.
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._loop.selector.register(ours, selectors.EVENT_READ, obey)
        try:
            yield
        finally:
            self._loop.selector.unregister(ours)
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()

    def _obey(self, number: int) -> None:
        if number == signal.SIGHUP:
            self.reload()
        elif number == signal.SIGTSTP:
            self._suspend()
        else:
            self._stopping = True

    def _suspend(self) -> None:
        """Stop for Ctrl-Z once no target is being worked on, because a target would stay stopped for as long."""
        paused = self.worker.paused
        self.worker.pause(True)
        self.worker.wait_for_rest(TOUCHING_SECONDS)
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # With the default action: the process stops here until SIGCONT.
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self.worker.pause(paused)

    def _sign_of_life(self) -> None:
        # Else the service manager ends and restarts the daemon (WatchdogSec=).
        if time.monotonic() - self.worker.beat < STUCK_SECONDS:
            self._notifier.send("WATCHDOG=1", f"STATUS={self._status_line()}")

    def _status_line(self) -> str:
        state = "paused" if self.worker.paused else "resting" if self.worker.pressure.resting else "working"
        folios = self.environment.total.collapsed.total()
        return f"{state}, {numbered(len(self.worker.targets), 'target')}, {numbered(folios, 'folio')} made"

    def _end(self) -> None:
        self._notifier.send("STOPPING=1")
        in_time = self.worker.stop(STOP_SECONDS, TOUCHING_SECONDS)
        self._event("stop", in_time=in_time)
        self._say("ended" if in_time else "ended while it read a process, which does no harm")

    # Requests.

    def reload(self) -> None:
        """Read the configuration again; if it is invalid, keep the old one."""
        # As Type=notify-reload wants it, until READY=1 (sd_notify(3)).
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        # Also if the configuration is refused: the signal may be that of logrotate.
        if self._events is not None:
            self._events.reopen()
        environment = self.environment
        try:
            configuration = self._load()
        except MthpError as error:
            self.refused_reloads += 1
            environment.reload_refused = True
            self._say(f"the new configuration is refused, the old one stays: {error.message}")
            self._event("reload_refused", error=error.message)
        else:
            self.reloads += 1
            environment.reload_refused = False
            for name in ("metrics", "events"):
                if getattr(configuration, name) != getattr(environment.configuration, name):
                    self._say(f"{name} has changed: restart the daemon to use it")
            self._keeping.keep(configuration.keep_max_ptes_none)
            self.worker.configure(configuration)
            self.finder.renew()
            self._say(f"configuration read again: {numbered(len(configuration.rules.rules), 'rule')}")
            self._event("reload", rules=len(configuration.rules.rules))
        environment.reload_at = time.time()
        self._notifier.send("READY=1", f"STATUS={self._status_line()}")

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        command = request.get("command")
        if command == "status":
            return to_object(self)
        if command in ("pause", "resume"):
            self.worker.pause(command == "pause")
            self._event(command)
            self._say("paused" if command == "pause" else "resumed")
            return to_object(self.worker)
        raise UsageError(f"unknown command {command!r}", help="use status, pause or resume")

    @property
    def uptime_seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._started

    @property
    def cpu_seconds(self) -> float:
        """The processor time of this process, in seconds."""
        times = os.times()
        return times.user + times.system

    @property
    def resident_memory_bytes(self) -> int:
        """The resident memory of this process, in bytes."""
        return memory_used()

    @property
    def orders_refused(self) -> list[str]:
        """The sizes that are not tried at the moment, because the machine had no folio of them."""
        return [self.geometry.label(order) for order in self.environment.free.exhausted()]

    @property
    def targets(self) -> list[Target]:
        """The processes that are worked on."""
        return list(self.worker.targets.values())
