"""One process that the daemon works on: when to check it, which ranges to scan, and the results.

There are three steps, each more expensive than the one before and taken only if that one found a reason:

1. *Look*: one line of ``/proc/PID/stat``. A process that took no page fault and mapped nothing has nothing new to
collapse. An idle process costs only this, as often as :mod:`mthp.daemon.environment` allows.
2. *Outline*: which PMD ranges its mappings have, and how much memory is in each (:class:`~mthp.outline.Outline`).
Ranges with the same layout as when they were finished are skipped (:class:`~mthp.daemon.ledger.Ledger`).
3. *Scan*: the entries of the remaining ranges, the fullest first, and the collapse by the policy
(:class:`mthp.engine.visit.Visit`).

A pass is 2 and 3; it is cut into pieces of some milliseconds, and the worker may leave the target between any two.
"""

from __future__ import annotations

import math
import time
from collections import Counter

from mthp.daemon.eagerness import EagernessLevel
from mthp.daemon.environment import FIRST_LOOK, SHORTEST_LOOK, Environment, on_grid
from mthp.daemon.forks import Forks
from mthp.daemon.ledger import Ledger
from mthp.daemon.pass_ import LeftAlone, TargetPass, account, give_back
from mthp.daemon.pressure import measured
from mthp.daemon.rules import Rule, Settings
from mthp.daemon.target_state import HeatKeeper, PartTurns, Sign, SmallFolios
from mthp.daemon.telemetry import WorkCounters
from mthp.errors import MthpError, TargetVanishedError
from mthp.linux.process import Process
from mthp.measuring import out_of_reach_bytes
from mthp.naming import ProcessFacts
from mthp.pacing import Backoff, ByteBudget

PIECE_RANGES = 32
"""Most PMD ranges in one piece of work."""

PIECE_SECONDS = 0.1
"""Intended seconds of a piece: its number of ranges follows from the last pieces, but is at least one."""

FIRST_LIST = 1.0
"""Seconds after which the mappings of a process without a fault are listed again: advice may have changed..."""

LAST_LIST = 60
"""... doubled each time, up to this multiple of scan_sleep_millisecs."""

LIST_SHARE = 0.02
"""The part of the time that listing the mappings of one process may take."""

REACH_SECONDS = 600.0
"""Seconds between two counts of memory out of reach in one process: each lists mappings and reads their edges."""

TRIM_SECONDS, TRIM_SHARE = 60.0, 0.02
"""Least seconds between two trims of one process, and their share of the time, because they read its contents."""

UNADVISED_SECONDS = 60.0, 3600.0
"""Seconds until memory without advice is tried again after no folio could be allocated for it, at first and in the end:
the target may undo its prctl, which is not visible (:mod:`mthp.thp_unadvised`).
"""

HELD_SECONDS = 1.0
"""Seconds between two checks whether a fork, or eagerness, still holds the work back."""

LEFT_OUT_SECONDS = 60.0
"""Seconds after which a process that could not be worked on is tried again."""

NOT_EAGER = "its eagerness, at this pressure and free memory, is below 1: nothing is made, and memory is given back"


class Target:
    """One process.

    Args:
        process: handle of the process; closed with this.
        facts: properties of the process by which its rule was found.

    Attributes:
        facts, rule: as given; :meth:`renew` replaces them.
        counters, service: counters of the work in the process, and of its service.
        resident, huge: bytes that are resident, and that PMD entries map, as last read.
        folio_pages: present pages by the order of their folio, in ranges where folios may be made, as last read.
        trimmable_bytes: bytes of zeroes that the last trim found and left; None before the first.
        next_at, trim_at: times of the next step and of the next trim.
        turn: place in the worker's queue.
        left_out: reason for which the process is not worked on, or ``""``.
        reasons: reasons of the backend for the last failed attempts, with the number of times.
        left_alone: mappings in which nothing may be made, by reason.
        out_of_reach_bytes: memory in no whole PMD range of its mapping, as last counted.
        small_folios, forks: small folios that were made and whether they last, and processes that share the memory.
        needs_move: sizes that are wanted and not made, with the reason; ``""`` if there are none.
        vanished, closed: whether the process was found to be gone, and whether the target is out of use.
    """

    JSON = (
        "pid=facts.pid comm=facts.comm rule=rule.name policy=rule.settings.policy left_out:null working"
        " eagerness_level=level.value next_look_seconds bloat_left_bytes=bloat_left reasons left_alone"
        " out_of_reach_bytes needs_move:null service=facts.service remade=small_folios.remade *counters"
    )
    """Its entry in the output of `mthp status`."""

    facts: ProcessFacts
    rule: Rule
    counters: WorkCounters
    left_out: str
    reasons: Counter[str]
    left_alone: list[LeftAlone]
    out_of_reach_bytes: int
    needs_move: str
    level: EagernessLevel
    small_folios: SmallFolios

    def __init__(self, process: Process, facts: ProcessFacts, rule: Rule, environment: Environment) -> None:
        self._environment = environment
        self.process, self.facts, self.rule = process, facts, rule
        self.counters = WorkCounters()
        self.service = environment.services.of(rule.name, facts.service)
        self.next_at = environment.clock()
        self.turn = 0
        self.left_out = self.needs_move = ""
        self.reasons: Counter[str] = Counter()
        self._ledger = Ledger()
        self.heat = HeatKeeper(environment, facts.pid)
        self._pass: TargetPass | None = None
        self._seen: Sign | None = None
        self._found_under: object = None
        self._makes: frozenset[int] | None = None
        self.small_folios = SmallFolios()
        self._interval = self._list_interval = 0.0
        self._list_at = self._reach_at = self.trim_at = 0.0
        self.level = EagernessLevel(rule.settings, environment.geometry, environment.clock())
        self._rate = ByteBudget(self.settings.rate, environment.clock)
        self.resident = self.huge = self.out_of_reach_bytes = 0
        self.folio_pages: list[int] = []
        self.trimmable_bytes: int | None = None
        # A small piece first, because the speed of this process is unknown.
        self._at_a_time = 2
        self._unadvised = Backoff()
        self._parts = PartTurns()
        self.forks = Forks()
        self.left_alone: list[LeftAlone] = []
        self.vanished = self.closed = False

    @property
    def settings(self) -> Settings:
        """The settings of its rule, at the current level of eagerness."""
        return self.level.settings

    @property
    def bloat_left(self) -> int | None:
        """The bytes that filling may still add; None for unlimited."""
        most = self.settings.max_bloat
        return None if most is None else most.of(self.resident) - self.counters.bloat_bytes

    @property
    def gain(self) -> int:
        """The pages that the rest of the pass may gain; most for a target that is new."""
        # A new target may have the most to gain, and the first pass shows it.
        return self._pass.gain if self._pass is not None else 0 if self.counters.passes else 1 << 62

    @property
    def next_look_seconds(self) -> float:
        """The seconds until the next step."""
        return max(0.0, self.next_at - self._environment.clock())

    @property
    def working(self) -> bool:
        """Whether a pass is unfinished."""
        return self._pass is not None

    @property
    def touched_now(self) -> bool:
        """Whether its memory is being worked on at this moment; callable from any thread."""
        return (current := self._pass) is not None and current.touching

    def renew(self, facts: ProcessFacts, rule: Rule) -> None:
        """Go on under another rule, and scan everything again."""
        self.facts, self.rule = facts, rule
        self.service = self._environment.services.of(rule.name, facts.service)
        self.level = EagernessLevel(rule.settings, self._environment.geometry, self._environment.clock())
        self._rate.set_rate(self.settings.rate)
        self.stale()

    def follow(self) -> None:
        """Scan everything again if the new switches or tunables change the work in this process."""
        if self._rules_of_the_moment() != self._found_under:
            self.stale()
        elif not self.left_out:
            self.next_at = min(self.next_at, self._environment.clock() + self._environment.scan_sleep)

    def _rules_of_the_moment(self) -> object:
        """Return the part of the switches and tunables that decides the work in this process.

        Most processes have no mapping with room for a PMD range, so that nothing does. One that maps such room later
        changes its size, and has its mappings listed again.
        """
        return () if self._makes is None else self._environment.decided_by(self._makes)

    def stale(self) -> None:
        """Forget finished ranges, because they were decided under old settings."""
        self.end_pass()
        self._ledger.forget()
        self.small_folios.stale()
        self._parts.changed()
        self._seen = None
        self.next_at = self._environment.clock()

    def step(self) -> None:
        """Do one piece of work, and set `next_at`; raise TargetVanishedError if the process is gone."""
        try:
            if reason := self._held_back():
                self.end_pass()
                self.left_out, self._seen = reason, None
                now = self._environment.clock()
                self.next_at = now + HELD_SECONDS
                if reason == NOT_EAGER and self.level.gives_back and self.trim_at <= now:
                    self.trim()
            elif self._pass is None:
                self._look()
            else:
                self._work(self._pass)
        except MthpError as error:
            self.end_pass()
            if isinstance(error, TargetVanishedError):
                raise
            self._leave_out(f"{error.message}; {error.help}" if error.help else error.message)

    def _held_back(self) -> str:
        """Return why nothing may be made now, or an empty text."""
        now, level = self._environment.clock(), self.level
        if level.follow(now, lambda: measured(self.process.read("cgroup").decode(errors="replace"))):
            self._rate.set_rate(level.settings.rate)
            self.stale()
        return self.forks.reason(now) or ("" if level.makes else NOT_EAGER)

    def _leave_out(self, reason: str) -> None:
        if reason != self.left_out:
            self._environment.event_of(self.facts, "left_out", reason=reason)
        self.left_out = reason
        # The next look counts as one at a process that has changed.
        self._seen = None
        self.next_at = self._environment.clock() + LEFT_OUT_SECONDS

    # Giving back.

    def trim(self) -> None:
        """Give back pages of zeroes, and set `trim_at`; raise TargetVanishedError if the process is gone."""
        share = self.settings.trim
        assert share is not None, "only a process of a rule with trim is trimmed"
        begun = self._environment.clock()
        # Also for a trim that fails.
        self.trim_at = begun + TRIM_SECONDS
        given, self.trimmable_bytes = give_back(self._environment, self.facts, share)
        self._count("trimmed_bytes", given)
        self.service.trimmed_bytes += given
        now = self._environment.clock()
        self.trim_at = max(self.trim_at, now + (now - begun) / TRIM_SHARE)

    # Looking.

    def _look(self) -> None:
        """Check whether anything may have changed, and begin a pass if so."""
        environment, looks = self._environment, self._environment.looks
        if self.heat.measuring:
            self.next_at = environment.clock() + FIRST_LOOK
            return
        now, longest, spent = environment.clock(), environment.scan_sleep, looks.spent()
        sign = Sign.parse(self.process.read("stat"))
        looks.took(looks.spent() - spent)
        self.resident = sign.resident * self._environment.geometry.page_size
        self._count("looks")
        # Copy-on-write of folios below the PMD order does not change the layout, so every range is due.
        if after_fork := self.forks.take_over(now):
            self._ledger.forget()
        touched = sign != self._seen or after_fork
        if touched:
            self._parts.changed()
            self._interval = 0.0
        parts_due = self.settings.small and self._parts.due(now)
        if touched or parts_due or now >= min(self._list_at, self._ledger.next_retry()):
            self._seen = sign
            most = LAST_LIST * longest
            self._list_interval = min(FIRST_LIST, longest) if touched else min(2 * self._list_interval, most)
            self._begin_pass(now, touched, after_fork)
        if self._pass is None:
            self._interval = min(max(2 * self._interval, FIRST_LOOK), looks.interval(self), longest)
            at = min(now + self._interval, max(self._ledger.next_retry(), now + SHORTEST_LOOK))
            self.next_at = on_grid(at, self._interval)

    def _begin_pass(self, now: float, touched: bool, after_fork: bool) -> None:
        environment = self._environment
        self._count("passes")
        self._pass = TargetPass(environment, self.facts.pid, self.level, lambda: self.bloat_left)
        if self._unadvised.rests(now):
            self._pass.only_advised()
        outline = self._pass.outline()
        self.huge = int(outline.pmd_mapped.sum()) * environment.geometry.pmd_size
        self.left_alone = self._pass.left_alone
        if now >= self._reach_at:
            self.out_of_reach_bytes = out_of_reach_bytes(self._pass.space)
            self._reach_at = now + REACH_SECONDS
        environment.looks.put(self, eligible=self._pass.eligible)
        due = self._ledger.due(outline, now, touched=touched)
        self._count("skipped", len(outline) - int(due.sum()))
        todo = due & ~outline.pmd_mapped
        if todo.any() and not self.heat.is_there(now, self.settings.heat):
            # Continue as if the process had been touched, once the measurement is over.
            self.end_pass()
            self._seen = None
            self.forks.put_back(after_fork)
            return
        self._pass.todo(outline[todo], self._ledger.was_large[todo] & after_fork, self.heat.heat)
        if self.settings.small and self._parts.due(now):
            self._pass.todo_parts()
            self._parts.planned(now)
        taken = self._environment.clock() - now
        # Without room for a PMD range, advice changes nothing, and a new mapping shows in the process's size.
        has_room = self._pass.visit.has_room
        self._makes = self._pass.makes if has_room else None
        self._list_at = now + max(self._list_interval, taken / LIST_SHARE) if has_room else math.inf
        self._found_under = self._rules_of_the_moment()
        self.left_out = ""
        self.needs_move = self._pass.needs_move if has_room else ""
        if self.needs_move:
            environment.say_once(("needs_move", self.rule.name), f"rule {self.rule.name}: {self.needs_move}")
        self.small_folios.look(environment, self._pass.space, outline, self.facts, self.rule)
        if self._pass.is_done:
            self._pass_done()
        else:
            self.next_at = self._environment.clock()

    # Working.

    def _work(self, current: TargetPass) -> None:
        """Scan some ranges, the fullest that are left."""
        environment = self._environment
        begun, ranges = environment.clock(), environment.ranges_within(self.settings.rate, self._at_a_time)
        done = current.piece(ranges)
        taken = max(environment.clock() - begun, 1e-6)
        # At most twice as many, because one piece may have been fast by chance.
        self._at_a_time = max(1, min(2 * ranges, PIECE_RANGES, int(ranges * PIECE_SECONDS / taken)))
        now, retry = environment.clock(), environment.scan_sleep
        for passage, after in done:
            size = account(environment, self.counters, self.service, self.facts, current.space, passage)
            self._rate.spend(size)
            environment.bytes.spend(size)
            if size and not len(passage.addresses):
                self._parts.made(now)
            self._ledger.scanned(passage.addresses, passage.results, after, now, retry, passage.folio_pages)
            self.small_folios.note(passage.attempts, environment.geometry)
        if current.reasons:
            # Few, because `mthp status` has them of every target.
            self.reasons = Counter(dict(current.reasons.most_common(8)))
            current.reasons.clear()
        if current.out_of_memory:
            self.end_pass()
            self._leave_out(f"a charge failed: {current.out_of_memory}")
            return
        if current.unadvised:
            self._unadvised.failed(now, *UNADVISED_SECONDS)
        rest = self._rate.wait()
        if current.is_done:
            self._pass_done()
            # Check the process again soon, because it is active, and the collapses may have made more possible.
            rest = max(rest, min(FIRST_LOOK, environment.scan_sleep))
        self.next_at = environment.clock() + rest

    def _count(self, name: str, by: int = 1) -> None:
        for counters in (self.counters, self._environment.total):
            setattr(counters, name, getattr(counters, name) + by)

    def _pass_done(self) -> None:
        """End a complete pass, and record its results."""
        self.folio_pages = self._ledger.folio_pages(self._environment.geometry.pmd_order)
        self._environment.pass_at = time.time()
        self.forks.pass_done(self._environment.clock())
        self.end_pass()

    def end_pass(self) -> None:
        """End the pass and leave the memory as it is; code that was injected is removed."""
        if self._pass is not None:
            self._pass.space.close()
        self._pass = None

    def close(self) -> None:
        """Close the process; a second call does nothing. The caller must have unregistered its pidfd."""
        self.closed = True
        self._environment.looks.drop(self)
        self.heat.close()
        self.end_pass()
        self.process.close()
