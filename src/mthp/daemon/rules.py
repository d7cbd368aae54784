"""The processes that the daemon works on, and their settings: rules, matched against the properties of a process.

A rule names properties of a process (:mod:`mthp.naming`); all of them must fit.

Of several rules that fit, one that denies wins; else the most specific one: a rule that names a PID goes before one
that names an executable, that before a name, a container, a pod, a unit, a cgroup, a user; of two that name the same
properties, the one with more characters that are not wildcards. Two rules clash if they are equally specific, may fit
the same process and have different settings: such a file is refused, because it does not decide between them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mthp.budget import DEFAULT_BLOAT, Amount, parse_amount, parse_bloat
from mthp.engine.policy_lookup import known_policy
from mthp.errors import UsageError
from mthp.heat import HeatRequest, parse_measured
from mthp.means import PAUSE_SHARE, Mechanism
from mthp.naming import Match, ProcessFacts
from mthp.toml import positive, whole
from mthp.units import parse_duration, parse_rate, parse_share

Limit = Annotated[int, "limit"]
"""PTEs of a PMD range, less one at most."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a process: the keys of ``[defaults]`` and of a ``[[rule]]``. None stands for the level above.

    Attributes:
        policy: pmd-only, rfc, rfc2, per-order, mainline, no-creep, or one of your own.
        orders: the orders that may be made, ascending: "64K,2M"; "all", whatever switches and advice are; or "enabled",
            the orders that the machine's switches allow.
        max_ptes_none, max_ptes_swap, max_ptes_shared: limits, per PMD range; not set (None): the tunables.
        mechanism: how blocks are made. "auto" injects no code: the PMD size by madvise, below it split (Linux 6.12 with
            debugfs) or else khugepaged (7.2, while no rate is set). "move": the sizes below the PMD size, by injected
            code that stops the process for max_pause. "madvise,move": both.
        small: also move memory outside of whole PMD ranges of its mapping (small mappings, and the edges of large ones)
            into folios below the PMD size. It needs a mechanism with "move".
        max_pause_ns: longest time for which its threads may be stopped at once.
        pause_share: the part of the time that they may be stopped, above 0, up to 1.
        max_bloat: memory that filling holes may add: a share of the resident memory, bytes, or "none" (None) for no
            bound.
        reserve: memory that must stay free below each memory limit of its cgroups and of the machine, as bytes or a
            share; not set (None): 10%, within 64M and 1G.
        max_threads: move no memory of a process with more threads; not set (None): as many as max_pause allows, 333 for
            each millisecond.
        eagerness: 0 to 10 sets max_ptes_none, max_bloat, trim, the rate and the smallest of the orders that are made,
            by how short memory is, and below 1 trims even while memory is not short; 10 fills as the kernel does
            for "always". It is lowered while the process's cgroup waits for memory, or the machine has less than 20%
            available. Not set (None): these keys.
        min_split_share: leave PMD ranges alone if a smaller share of their contents would lie in folios made by splits.
        rate: bytes collapsed in one process per second at most; not set (None): no bound.
        trim: while memory is short, give back the pages of zeroes of large folios in which this share of the pages
            holds nothing else; not set (None): no trimming. Collapses fill less than half of that, so that they make
            nothing that a trim would undo.
        heat: time for which to observe which memory is used (5% of a processor); that is collapsed first: "5s", or by
            one source alone "damon:5s", "idle:5s", "young:5s"; not set (None): order by fullness alone.
    """

    policy: Annotated[str, known_policy] = "mainline"
    orders: Annotated[tuple[int, ...] | Literal["enabled"], "orders"] = "enabled"
    max_ptes_none: Limit | None = None
    max_ptes_swap: Limit | None = None
    max_ptes_shared: Limit | None = None
    mechanism: Mechanism = "auto"
    small: bool = False
    max_pause_ns: Annotated[int, positive(parse_duration)] = 5_000_000
    pause_share: Annotated[float, positive(parse_share)] = PAUSE_SHARE
    max_bloat: Annotated[Amount | None, parse_bloat] = DEFAULT_BLOAT
    reserve: Annotated[Amount | None, parse_amount] = None
    max_threads: Annotated[int, whole(1)] | None = None
    eagerness: Annotated[int, whole(0, 10)] | None = None
    min_split_share: Annotated[float, parse_share] = 0.0
    rate: Annotated[int, parse_rate] | None = None
    trim: Annotated[float, positive(parse_share)] | None = None
    heat: Annotated[HeatRequest, parse_measured] | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule."""

    name: str
    match: Match
    deny: bool = False
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rules.

    Attributes:
        rules: the most specific first, those that deny before all others.

    Raises:
        UsageError: two of them clash.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        ranked = sorted(self.rules, key=lambda rule: (rule.deny, rule.match.specificity), reverse=True)
        # A frozen dataclass has no other way.
        object.__setattr__(self, "rules", tuple(ranked))
        for one, other in _clashes(self.rules):
            raise UsageError(
                f"rules {one.name!r} and {other.name!r} clash: both are for {_described(one.match)}, equally specific,"
                f" and differ in {', '.join(_differences(one.settings, other.settings))}",
                help="make one of them more specific, or make their settings equal",
            )

    def rule_for(self, facts: ProcessFacts) -> Rule | None:
        """Return the rule for a process; None if none fits."""
        return next((rule for rule in self.rules if rule.match.fits(facts)), None)

    @property
    def properties(self) -> frozenset[str]:
        """The properties that any rule names, and that must be read of every process."""
        return frozenset(name for rule in self.rules for name in rule.match.named)


def _clashes(rules: Iterable[Rule]) -> Iterator[tuple[Rule, Rule]]:
    for one, other in itertools.combinations(rules, 2):
        # One that denies wins, and equal settings need no decision.
        if one.deny or other.deny or one.settings == other.settings:
            continue
        if one.match.named != other.match.named or one.match.specificity != other.match.specificity:
            continue
        if one.match.may_share_a_process(other.match):
            yield one, other


def _described(match: Match) -> str:
    return " and ".join(f"{name} {' or '.join(map(str, getattr(match, name)))}" for name in match.named) or "everything"


def _differences(one: Settings, other: Settings) -> list[str]:
    names = [field.name for field in dataclasses.fields(Settings)]
    return [name for name in names if getattr(one, name) != getattr(other, name)]
