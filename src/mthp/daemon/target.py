"""One process that the daemon works on: when to look at it, what to look at in it, and what came of that.

There are three depths of looking, each dearer than the one before and only gone to if the one before gives cause:

1. *Look*: one line of ``/proc/PID/stat``. A process that took no page fault and mapped nothing has nothing new to
   collapse. This is all that an idle process costs, as often as :mod:`mthp.daemon.looks` allows.
2. *Outline*: which PMD ranges its mappings have, and how much each holds (:class:`~mthp.outline.Outline`). What is laid
   out as it was when it was finished is passed over (:class:`~mthp.daemon.ledger.Ledger`).
3. *Scan*: the entries of the ranges that are left, the fullest first, and the collapse of what the policy wants
   (:class:`mthp.engine.visit.Visit`).

A pass is 2 and 3; it is cut into pieces of some milliseconds, and the target may be left between any two.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

from mthp.daemon.accounts import account
from mthp.daemon.counters import Counters
from mthp.daemon.environment import SHORTEST_LOOK, Environment
from mthp.daemon.forks import CHILD, Forks
from mthp.daemon.givingback import give_back
from mthp.daemon.heat import HeatKeeper
from mthp.daemon.ledger import Ledger
from mthp.daemon.levels import Level
from mthp.daemon.looks import FIRST_LOOK, Sign, on_grid
from mthp.daemon.onepass import LeftAlone, Pass, decided_by
from mthp.daemon.pressure import measured
from mthp.daemon.rules import Rule, Settings
from mthp.daemon.smallfolios import SmallFolios
from mthp.daemon.unadvised import Unadvised
from mthp.engine.visited import Passage
from mthp.errors import MthpError, TargetVanishedError
from mthp.linux.process import Process
from mthp.measuring import out_of_reach_bytes
from mthp.naming import ProcessFacts
from mthp.outline import Outline
from mthp.pacing import ByteBudget

PIECE_RANGES = 32
"""PMD ranges in one piece of work at most."""

PIECE_SECONDS = 0.1
"""How long a piece should take: as many ranges as that allows, going by the last ones, but at least one."""

FIRST_LIST = 1.0
"""Seconds after which the mappings of a process without a fault are listed again: advice may have changed..."""

LAST_LIST = 60
"""... which doubles, up to so many times scan_sleep_millisecs."""

LIST_SHARE = 0.02
"""The part of the time that listing the mappings of one process may take."""

REACH_SECONDS = 600.0
"""Between two counts of what is out of reach in one process: its mappings are listed and their edges read for each."""

TRIM_SECONDS, TRIM_SHARE = 60.0, 0.02
"""Between two trims of one process at least, and the part of the time that they may take: its contents are read."""

HELD_SECONDS = 1.0
"""Between two looks at whether a child that shares the memory, or its pressure, still holds the work back."""

LEFT_OUT_SECONDS = 60.0
"""After which a process that could not be worked on is tried again."""


NOT_EAGER = "its eagerness, at this pressure and free memory, is below 1: nothing is made, and memory is given back"


class Target:
    """One process.

    Args:
        process: a handle of it; closed with this.
        facts: what its rule was found by.
        rule: the rule that holds for it.

    Attributes:
        facts, rule: as given; may be replaced.
        counters: of the work done in it.
        service: counters of its service.
        resident, huge: bytes that are resident, and that PMD entries map, as last seen.
        next_at: when to go on with it.
        turn: its place in the worker's queue.
        trim_at: when it may be trimmed again.
        gain: pages that the rest of the pass may gain; what is worth most is done first.
        left_out: why it is not worked on, or ``""``.
        reasons: why the last attempts failed, where the backend said so, by how often.
        left_alone: mappings in which nothing may be made, by reason.
        out_of_reach_bytes: memory in no whole PMD range of its mapping, as last counted.
        level: the level of eagerness that holds now.
        small_folios: those that were made, and whether they last.
        forks: children that it has forked.
        needs_move: sizes that are wanted and not made, with the reason; ``""`` if there are none.
        vanished: it was found to be gone.
        closed: it is to be worked on no more.
    """

    JSON = (
        "pid=facts.pid comm=facts.comm rule=rule.name policy=rule.settings.policy left_out:null working"
        " eagerness_level=level.value next_look_seconds bloat_left_bytes=bloat_left reasons left_alone"
        " out_of_reach_bytes needs_move:null service=facts.service remade=small_folios.remade *counters"
    )
    """What `mthp status` prints of it."""

    facts: ProcessFacts
    rule: Rule
    counters: Counters
    left_out: str
    reasons: Counter[str]
    left_alone: list[LeftAlone]
    out_of_reach_bytes: int
    needs_move: str
    level: Level
    small_folios: SmallFolios

    def __init__(self, process: Process, facts: ProcessFacts, rule: Rule, environment: Environment) -> None:
        self.process = process
        self.facts = facts
        self.rule = rule
        self.counters = Counters()
        self.service = environment.services.of(rule.name, facts.service)
        self.next_at = environment.clock()
        self.turn = 0
        self.gain = 1 << 62
        self.left_out = ""
        self.reasons: Counter[str] = Counter()
        self.needs_move = ""
        self._environment = environment
        self._ledger = Ledger()
        self.heat = HeatKeeper()
        self._pass: Pass | None = None
        self._seen: Sign | None = None
        self._has_room = False
        self._found_under: object = None
        self._makes: frozenset[int] = frozenset()
        self.small_folios = SmallFolios()
        self._interval = 0.0
        self._list_at = 0.0
        self._list_interval = 0.0
        self.level = Level(rule.settings, environment.geometry, environment.clock())
        self._rate = ByteBudget(self.settings.rate, environment.clock)
        self.resident = self.huge = 0
        self._at_a_time = 2
        self._unadvised = Unadvised()
        self.forks = Forks()
        self.left_alone: list[LeftAlone] = []
        self.out_of_reach_bytes = 0
        self._reach_at = 0.0
        self.trim_at = 0.0
        self.vanished = False
        self.closed = False

    @property
    def settings(self) -> Settings:
        """Those of its rule, at the level of eagerness that holds now."""
        return self.level.settings

    @property
    def label(self) -> str:
        """PID and name."""
        return f"{self.facts.pid} ({self.facts.comm})"

    @property
    def bloat_left(self) -> int | None:
        """Bytes that filling may still add; None for no bound."""
        if self.settings.max_bloat is None:
            return None
        return self.settings.max_bloat.of(self.resident) - self.counters.bloat_bytes

    @property
    def next_look_seconds(self) -> float:
        """Seconds until it is gone on with."""
        return max(0.0, self.next_at - self._environment.clock())

    @property
    def working(self) -> bool:
        """Whether it is in the middle of a pass."""
        return self._pass is not None

    @property
    def touched_now(self) -> bool:
        """Whether its memory is being worked on at this moment; callable from any thread."""
        current = self._pass
        return current is not None and current.touching

    def renew(self, facts: ProcessFacts, rule: Rule) -> None:
        """Go on under another rule: everything is looked at anew."""
        self.facts, self.rule = facts, rule
        self.service = self._environment.services.of(rule.name, facts.service)
        self.level = Level(rule.settings, self._environment.geometry, self._environment.clock())
        self._rate.set_rate(self.settings.rate)
        self.stale()

    def follow(self) -> None:
        """The system's switches or tunables are others now: if that matters here, everything is looked at anew."""
        if self._rules_of_the_moment() != self._found_under:
            self.stale()
        elif not self.left_out:
            self.next_at = min(self.next_at, self._environment.clock() + self._environment.scan_sleep)

    def _rules_of_the_moment(self) -> object:
        """What of the switches and tunables decides what is to be done in it.

        Most processes have no mapping with room for a PMD range, so that nothing does. One that gets such a mapping
        later shows that by its size, and has its mappings listed again.
        """
        if not self._has_room:
            return ()
        return decided_by(self._environment, self._makes)

    def stale(self) -> None:
        """What was found finished was so under switches, tunables or rules that hold no more."""
        self._end_pass()
        self._ledger.forget()
        self.small_folios.stale()
        self._seen = None
        self.next_at = self._environment.clock()

    def step(self) -> None:
        """Do one piece of work, and set `next_at`.

        Raises:
            TargetVanishedError: it is gone.
        """
        try:
            if reason := self._held_back():
                self._end_pass()
                self.left_out, self._seen = reason, None
                now = self._environment.clock()
                self.next_at = now + HELD_SECONDS
                if reason == NOT_EAGER and self.level.gives_back and self.trim_at <= now:
                    self.trim()
            elif self._pass is None:
                self._look()
            else:
                self._work(self._pass)
        except TargetVanishedError:
            self._end_pass()
            raise
        except MthpError as error:
            self._end_pass()
            self._leave_out(f"{error.message}; {error.help}" if error.help else error.message)

    def _held_back(self) -> str:
        """Return why nothing may be made now, whatever is there to do, or an empty text."""
        now, level = self._environment.clock(), self.level
        if level.follow(now, lambda: measured(self.process.read("cgroup").decode(errors="replace"))):
            self._rate.set_rate(level.settings.rate)
            self.stale()
        return CHILD if self.forks.holds(now) else "" if level.makes else NOT_EAGER

    def _leave_out(self, reason: str) -> None:
        if reason != self.left_out:
            self._environment.event("left_out", pid=self.facts.pid, comm=self.facts.comm, reason=reason)
        self.left_out = reason
        self._seen = None
        self.next_at = self._environment.clock() + LEFT_OUT_SECONDS

    # Giving back.

    def trim(self) -> None:
        """Give back pages of zeroes, and set `trim_at`.

        Raises:
            TargetVanishedError: it is gone.
        """
        share = self.settings.trim
        assert share is not None, "only a process whose rule has it is trimmed"
        begun = self._environment.clock()
        self.trim_at = begun + TRIM_SECONDS
        given = give_back(self._environment, self.facts, share)
        self._count("trimmed_bytes", given)
        self.service.trimmed_bytes += given
        now = self._environment.clock()
        self.trim_at = max(self.trim_at, now + (now - begun) / TRIM_SHARE)

    # Looking.

    def _look(self) -> None:
        """See whether anything may have changed, and begin a pass if so."""
        environment, looks = self._environment, self._environment.looks
        if self.heat.measuring:
            self.next_at = environment.clock() + FIRST_LOOK
            return
        now, longest, spent = environment.clock(), environment.scan_sleep, looks.spent()
        sign = Sign.parse(self.process.read("stat"))
        looks.took(looks.spent() - spent)
        self.resident = sign.resident * self._environment.geometry.page_size
        self._count("looks")
        # What copy-on-write broke up shows in no layout where folios below the PMD order were, so all is due.
        after_fork = self.forks.take_over()
        if after_fork:
            self._ledger.forget()
        touched = sign != self._seen or after_fork
        if touched or now >= min(self._list_at, self._ledger.next_retry()):
            self._seen = sign
            first = min(FIRST_LIST, longest)
            self._list_interval = first if touched else min(2 * self._list_interval, LAST_LIST * longest)
            self._interval = 0.0 if touched else self._interval
            self._begin_pass(now, touched, after_fork=after_fork)
        if self._pass is None:
            self._interval = min(max(2 * self._interval, FIRST_LOOK), looks.interval(self), longest)
            self.next_at = on_grid(
                min(now + self._interval, max(self._ledger.next_retry(), now + SHORTEST_LOOK)), self._interval
            )

    def _begin_pass(self, now: float, touched: bool, *, after_fork: bool = False) -> None:
        environment = self._environment
        self._count("passes")
        self._pass = Pass(self._environment, self.facts.pid, self.settings, lambda: self.bloat_left)
        if self._unadvised.holds(now):
            self._pass.only_advised()
        outline = self._pass.outline()
        self.huge = int(outline.pmd_mapped.sum()) * environment.geometry.pmd_size
        self.left_alone = self._pass.left_alone
        if now >= self._reach_at:
            self.out_of_reach_bytes = out_of_reach_bytes(self._pass.space)
            self._reach_at = now + REACH_SECONDS
        self._environment.looks.put(self, eligible=self._pass.eligible)
        due = self._ledger.due(outline, now, touched=touched)
        self._count("skipped", len(outline) - int(due.sum()))
        todo = due & ~outline.pmd_mapped
        opened, stopping = partial(environment.opened, self.facts.pid), environment.stopping
        if todo.any() and not self.heat.is_there(now, self.settings.heat, opened, stopping):
            # It is gone on with once that is over, as if it had been touched.
            self._end_pass()
            self._seen = None
            return
        self._pass.todo(outline[todo], self._ledger.was_large[todo] & after_fork, self.heat.heat)
        taken = self._environment.clock() - now
        # Advice makes nothing of a process that has no room for a PMD range: only a new mapping can, and that shows.
        self._has_room, self._makes = self._pass.has_room, self._pass.makes
        self._list_at = now + max(self._list_interval, taken / LIST_SHARE) if self._has_room else math.inf
        self._found_under = self._rules_of_the_moment()
        self.left_out = ""
        self.needs_move = self._pass.needs_move if self._has_room else ""
        if self.needs_move:
            environment.say_once(("needs_move", self.rule.name), f"rule {self.rule.name}: {self.needs_move}")
        self.small_folios.look(environment, self._pass.space, outline, self.facts, self.rule)
        if self._pass.is_done:
            self._end_pass()
        else:
            self.gain = self._pass.gain
            self.next_at = self._environment.clock()

    # Working.

    def _work(self, current: Pass) -> None:
        """Scan some ranges, the fullest that are left."""
        environment = self._environment
        begun, ranges = environment.clock(), environment.ranges_within(self.settings.rate, self._at_a_time)
        current.govern()
        done = current.piece(ranges)
        taken = max(environment.clock() - begun, 1e-6)
        self._at_a_time = max(1, min(2 * ranges, PIECE_RANGES, int(ranges * PIECE_SECONDS / taken)))
        for passage, after in done:
            self._account(current, passage, after)
        if current.reasons:
            self.reasons = Counter(dict(current.reasons.most_common(8)))
            current.reasons.clear()
        if current.out_of_memory:
            self._end_pass()
            self._leave_out(f"a charge failed: {current.out_of_memory}")
            return
        if current.unadvised:
            self._unadvised.found(environment.clock())
        self.gain = current.gain
        rest = self._rate.wait()
        if current.is_done:
            self._end_pass()
            # Looked at again soon: what was collapsed may have made more possible, and it is an active process.
            rest = max(rest, min(FIRST_LOOK, environment.scan_sleep))
        self.next_at = environment.clock() + rest

    def _account(self, current: Pass, passage: Passage, after: Outline) -> None:
        """Count what a passage did, and note what is to be done about it later."""
        environment = self._environment
        size = account(environment, self.counters, self.service, self.facts, current.space, passage)
        self._rate.spend(size)
        environment.bytes.spend(size)
        self._ledger.scanned(passage.addresses, passage.results, after, environment.clock(), environment.scan_sleep)
        self.small_folios.note(passage.attempts, environment.geometry)

    def _count(self, name: str, by: int = 1) -> None:
        for counters in (self.counters, self._environment.total):
            setattr(counters, name, getattr(counters, name) + by)

    def _end_pass(self) -> None:
        if self._pass is not None:
            self._pass.close()
            self.gain = 0
        self._pass = None

    def end(self) -> None:
        """Leave its memory as it is; what was put into it is taken out."""
        self._end_pass()

    def close(self) -> None:
        """Let go of the process. Closing twice does nothing. Nobody may wait for its pidfd any more."""
        self.closed = True
        self._environment.looks.drop(self)
        self.heat.close()
        self._end_pass()
        self.process.close()
