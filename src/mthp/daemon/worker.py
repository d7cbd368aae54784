"""The worker's thread: it works on the targets in turn, one piece at a time, within the budgets.

There is one thread, so budgets, the windows of the mover and the switches that it reads need no further locks. The main
thread adds, renews and drops targets, pauses and stops. A piece takes milliseconds; between two it handles requests.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import traceback
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

from mthp.daemon.config import Configuration
from mthp.daemon.environment import Environment
from mthp.daemon.forks import Lineage
from mthp.daemon.kernel_settings import SystemKnobs
from mthp.daemon.pressure import MemoryPressure
from mthp.daemon.rules import Rule
from mthp.daemon.target import LEFT_OUT_SECONDS, Target
from mthp.errors import TargetVanishedError
from mthp.linux.procevents import Changes, SharingEvent
from mthp.naming import ProcessFacts
from mthp.pacing import CpuBudget

FOLLOW_SECONDS = 0.1
"""Least seconds between two reads of the system's switches while nothing is collapsed."""

RESTING_SECONDS = 0.5
"""Seconds between two checks whether memory pressure has eased."""


class Worker:
    """Works on targets in a thread of its own.

    Args:
        died: called in the worker's thread if an internal error ends it.

    Attributes:
        targets: all targets, by PID.
        failed: whether an internal error ended the thread.
        beat: time when the worker last worked, or rested with nothing to do.
    """

    JSON = "paused busy"

    paused: bool
    pressure: MemoryPressure

    def __init__(
        self,
        environment: Environment,
        knobs: SystemKnobs,
        pressure: MemoryPressure,
        cpu: CpuBudget,
        died: Callable[[], None] = lambda: None,
    ) -> None:
        self.environment, self.pressure, self.cpu = environment, pressure, cpu
        self.targets: dict[int, Target] = {}
        self.paused = False
        self.failed = False
        self._died = died
        self._knobs, self._clock = knobs, environment.clock
        # Its lock is an RLock, because _rest() is also called while it is held.
        self._turn = threading.Condition()
        self._waiting: list[tuple[float, int, Target]] = []
        self._ready: list[tuple[int, int, Target]] = []
        self._renewals: list[tuple[Target, ProcessFacts, Rule]] = []
        self._numbers = itertools.count()
        self._busy: Target | None = None
        self._scanned_until: int | None = None
        self._rests_until = 0.0
        self._stop = False
        self._lineage = Lineage(lambda pid: None if (target := self.targets.get(pid)) is None else target.forks)
        self._version = -1
        self._followed = self.beat = self._clock()
        environment.stopping = lambda: self._stop or self.paused
        self._thread = threading.Thread(target=self._run, name="mthp-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # Requests of the main thread.

    def add(self, target: Target) -> None:
        """Work on `target` from now on."""
        with self._turn:
            self.targets[target.facts.pid] = target
            # A child shares its parent's memory as much as the parent shares the child's.
            for other, since in sorted(self._lineage.sharing(target.facts.pid).items(), key=itemgetter(1)):
                target.forks.began(other, since)
            self._queue(target)
            self._turn.notify()

    def drop(self, target: Target) -> None:
        """Remove a target. It is closed once no work on it is running.

        The caller must have unregistered its pidfd, because the number may soon be that of another file.
        """
        with self._turn:
            del self.targets[target.facts.pid]
            target.closed = True
            if target is not self._busy:
                target.close()

    def renew(self, target: Target, facts: ProcessFacts, rule: Rule) -> None:
        """Apply another rule to a target."""
        with self._turn:
            self._renewals.append((target, facts, rule))
            self._turn.notify()

    def forked(self, changes: Changes) -> None:
        """Note which targets share their memory since a fork, and which no longer do."""
        events = list(changes.sharing)
        if changes.lost:
            # Their ends may be among the lost events.
            gone = [pid for pid in self._lineage if not Path(f"/proc/{pid}").exists()]
            events += [SharingEvent("exit", pid) for pid in gone]
        if not events:
            return
        now = self._clock()
        with self._turn:
            again = self._lineage.take(events, now)
            for pid in again:
                self.targets[pid].next_at = now
            if again:
                self._requeue()
                self._turn.notify()

    def configure(self, configuration: Configuration) -> None:
        """Apply the budgets and rules of another configuration."""
        with self._turn:
            environment = self.environment
            environment.configuration = configuration
            environment.said.clear()
            self.cpu.set(configuration.cpu)
            self.pressure.limit = configuration.max_memory_pressure
            environment.bytes.set_rate(configuration.bytes_per_second)
            # The next _follow_system() applies its switches and tunables.
            self._version = -1

    def pause(self, paused: bool) -> None:
        """Begin nothing while `paused` is set."""
        with self._turn:
            self.paused = paused
            self._turn.notify()

    def wait_for_rest(self, timeout: float) -> bool:
        """Wait until no target is worked on, `timeout` seconds at most; return whether that is so."""
        with self._turn:
            return self._turn.wait_for(lambda: self._busy is None, timeout)

    def stop(self, timeout: float, longest: float) -> bool:
        """End after the current piece, and end the work on all targets; return whether that was so in time.

        Args:
            timeout: seconds to wait.
            longest: seconds to wait while a target is being changed, because the change must be finished.
        """
        with self._turn:
            self._stop = True
            self._turn.notify()
        begun = self._clock()
        self._thread.join(timeout)
        # Reading the mappings of a very large process may take longer, and an end in the middle of that does no harm.
        while (target := self._busy) is not None and target.touched_now and self._clock() - begun < longest:
            self._thread.join(0.01)
        return not self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether a piece of work is running."""
        return self._busy is not None

    # The thread.

    def _run(self) -> None:
        try:
            while not self._stop:
                self._once()
        except BaseException:
            self.failed = True
            self.environment.say(f"the worker ends because of an internal error\n{traceback.format_exc()}")
            self._died()
        finally:
            # Also after an error, because a pass may have injected code.
            for target in list(self.targets.values()):
                target.end_pass()

    def _once(self) -> None:
        if (wait := self._must_wait()) > 0:
            # While memory is short, trims are the work that helps.
            if self.paused or not self.pressure.resting or not self._trim():
                self._rest(wait)
            return
        with self._turn:
            target = self._next()
            if target is None:
                self._rest(max(self._waiting[0][0] - self._clock(), 1e-3) if self._waiting else 1.0)
                return
            self._busy = target
        self._follow_system(at_once=target.working)
        self._work(target, target.step, queue=True)

    def _must_wait(self) -> float:
        """Return the seconds for which nothing may be begun."""
        if self.paused:
            return RESTING_SECONDS
        # Without targets nothing would be begun, so an idle daemon reads no pressure.
        if not self.targets:
            return 0.0
        was, rests, share = self.pressure.resting, self.pressure.rests(), self.pressure.share
        if rests != was:
            self.environment.say(f"memory pressure is {100 * share:.1f}%: {'resting' if rests else 'working'}")
            self.environment.event("resting" if rests else "going_on", memory_pressure=share)
        if rests:
            return RESTING_SECONDS
        return max(self.cpu.wait(), self.environment.bytes.wait(), self._kernel_pace())

    def _kernel_pace(self) -> float:
        """Return the rest that is left after pages_to_scan entries, under the kernel's pace; 0.0 under others."""
        environment, now = self.environment, self._clock()
        if environment.configuration.pace != "kernel":
            return 0.0
        scanned = environment.total.scanned_ptes
        if self._scanned_until is None or scanned >= self._scanned_until:
            if self._scanned_until is not None:
                self._rests_until = now + environment.tunables.scan_sleep_millisecs / 1000
            self._scanned_until = scanned + environment.tunables.pages_to_scan
        return max(self._rests_until - now, 0.0)

    def _next(self) -> Target | None:
        """Return the due target with the largest gain; None if none is due."""
        now = self._clock()
        for target, facts, rule in self._renewals:
            if not target.closed:
                target.renew(facts, rule)
        if self._renewals:
            self._renewals = []
            self._requeue()
        while self._waiting and self._waiting[0][0] <= now:
            _, number, target = heapq.heappop(self._waiting)
            # The number breaks ties, because targets cannot be compared.
            heapq.heappush(self._ready, (-target.gain, number, target))
        while self._ready:
            _, _, target = heapq.heappop(self._ready)
            if not (target.closed or target.vanished):
                return target
        return None

    def _queue(self, target: Target) -> None:
        """Queue `target` for its next step, after those that wait already."""
        target.turn = next(self._numbers)
        heapq.heappush(self._waiting, (target.next_at, target.turn, target))

    def _requeue(self) -> None:
        """Queue all targets again but the current one, because their next steps may be earlier now."""
        # Turns stay as they were: this may happen often, and new turns would starve the last targets.
        queued = [each for each in self.targets.values() if each is not self._busy and not each.vanished]
        self._ready, self._waiting = [], [(target.next_at, target.turn, target) for target in queued]
        heapq.heapify(self._waiting)

    def _trim(self) -> bool:
        """Trim the next process while memory is short; return whether there was one."""
        now = self._clock()
        with self._turn:
            wanted = [
                target
                for target in self.targets.values()
                if target.settings.trim is not None and target.trim_at <= now and not target.vanished
            ]
            if not wanted:
                return False
            self._busy = target = min(wanted, key=lambda target: target.trim_at)
        # The target is queued for its next step already.
        self._work(target, target.trim, queue=False)
        return True

    def _work(self, target: Target, work: Callable[[], None], *, queue: bool) -> None:
        """Do one piece of `work` on the busy target, then `queue` it. An error in it leaves the others as they are."""
        self.beat = self._clock()
        try:
            work()
        except TargetVanishedError:
            # The main thread learns of the end too, and drops the target.
            target.vanished = True
        except Exception as error:  # an internal error in one target must not stop the others
            self.environment.say(
                f"process {target.facts.pid} ({target.facts.comm}): {error!r}\n{traceback.format_exc()}"
            )
            self.environment.event_of(target.facts, "error", error=repr(error))
            target.stale()
            target.left_out = f"internal error: {error!r}"
            target.next_at = self._clock() + LEFT_OUT_SECONDS
        finally:
            self.beat = self._clock()
            with self._turn:
                self._busy = None
                if target.closed:
                    # The main thread dropped it meanwhile.
                    target.close()
                elif queue and not target.vanished:
                    self._queue(target)
                self._turn.notify_all()

    def _follow_system(self, *, at_once: bool) -> None:
        """Apply the current switches and tunables; targets that they affect are scanned again.

        Args:
            at_once: read them now, because a collapse follows; if not, they may be some moments old.
        """
        now = self._clock()
        if at_once or self._version < 0 or now - self._followed >= FOLLOW_SECONDS:
            self._followed = now
            self._knobs.refresh()
        if self._knobs.version == self._version:
            return
        first, self._version = self._version < 0, self._knobs.version
        environment = self.environment
        switches = environment.configuration.switches_over(self._knobs.switches)
        tunables = environment.configuration.tunables_over(self._knobs.tunables, environment.geometry)
        if (switches, tunables) == (environment.switches, environment.tunables):
            return
        environment.switches, environment.tunables = switches, tunables
        if not first:
            sizes = switches.words_by_size(environment.geometry)
            environment.event("switches", enabled=switches.enabled, sizes=sizes)
        with self._turn:
            for other in self.targets.values():
                other.follow()
            self._requeue()

    def _rest(self, seconds: float) -> None:
        with self._turn:
            self.beat = self._clock()
            # Checked under the lock, so that the notice of stop() cannot come just before the wait.
            if not self._stop:
                # At most a second, so that `beat` shows that the worker lives.
                self._turn.wait(min(seconds, 1.0))
