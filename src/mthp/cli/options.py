"""Options that several commands share, and their conversion from text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import click

from mthp.budget import DEFAULT_BLOAT, parse_amount, parse_bloat
from mthp.cli.completing import complete_policy, complete_target
from mthp.engine.select import PlanOptions
from mthp.errors import UsageError
from mthp.heat import parse_heat
from mthp.means import Means
from mthp.units import above_zero, parse_duration, parse_rate, parse_share, parse_size

Command = TypeVar("Command", bound=Callable[..., Any])
Options = TypeVar("Options", PlanOptions, Means)


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """The type of an option with a unit: its name in the help, its parser, and whether it may be 0.

    Errors are :class:`~mthp.errors.UsageError` with the option's name, because click's own errors have no instruction.
    """

    def __init__(self, name: str, read: Callable[[object], Any], *, zero: bool = False) -> None:
        self.name = name
        self._read, self._zero = read, zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            # click converts a value that is converted already, and also a default.
            return value
        try:
            read = self._read(value)
            if not self._zero:
                above_zero(value, read)
        except UsageError as error:
            option = param.opts[-1] if param is not None else self.name
            raise UsageError(f"{option}: {error.message}", help=error.help) from error
        return read


SHARE = Quantity("%", parse_share)
"""A share above 0, as a float."""

SHARE_OR_ZERO = Quantity("%", parse_share, zero=True)

AMOUNT = Quantity("SIZE|%", parse_amount, zero=True)
"""A share or a size, as an :class:`~mthp.budget.Amount`."""

BLOAT = Quantity("SIZE|%|none", parse_bloat, zero=True)
"""The same; None for unlimited."""

SIZE = Quantity("SIZE", lambda text: parse_size(text, bare=False))
"""Bytes, above 0."""

RATE = Quantity("SIZE", parse_rate)
"""Bytes a second, above 0."""

DURATION = Quantity("TIME", lambda text: parse_duration(text) / 1e9)
"""Seconds, above 0."""

SECONDS = Quantity("TIME", lambda text: parse_duration(text, bare="s") / 1e9)
"""The same; a number without a unit is seconds."""


HEAT = Quantity("TIME|FILE", parse_heat, zero=True)
"""The source of heat, as a :class:`~mthp.heat.HeatRequest`; a time is above 0."""

heat_option = click.option(
    "--heat",
    type=HEAT,
    help="Heat: observe for TIME, such as 5s, which memory is used (by DAMON, idle page tracking or young bits; or"
    " damon:5s, idle:5s, young:5s), or read a FILE of start,end,accesses. Hot memory comes first.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
target_argument = click.argument("target", shell_complete=complete_target)
at_option = click.option(
    "--at",
    metavar="STEP",
    help="Step of a recording: its number, negative from the end; or a time from its beginning, such as 30s or 5m. By"
    " default the last.",
)


def plan_options(function: Command) -> Command:
    """Add the options that are fields of :class:`PlanOptions`."""
    # Decorators apply from the bottom up, and --help lists the options in that order.
    for option in reversed(_PLAN_OPTIONS):
        function = option(function)
    return function


_PLAN_OPTIONS = (
    click.option(
        "--policy",
        default="mainline",
        show_default=True,
        metavar="NAME",
        shell_complete=complete_policy,
        help="Policy that chooses orders: pmd-only, rfc, rfc2, per-order, mainline, no-creep, or one of your own.",
    ),
    click.option(
        "--orders",
        metavar="SIZES",
        help="Folio sizes that may be made, such as 16K,64K,2M; all by default; 'enabled' for what the system's"
        " switches allow.",
    ),
    click.option("--max-ptes-none", type=int, metavar="N", help="Empty pages a collapse may fill, per PMD range."),
    click.option("--max-ptes-swap", type=int, metavar="N", help="Swapped pages it may read back, per PMD range."),
    click.option("--max-ptes-shared", type=int, metavar="N", help="Shared pages it may copy, per PMD range."),
    click.option("--mthp-min-order", type=int, metavar="K", help="The chunk order of rfc's bitmap; 3 by default."),
    click.option("--include-file", is_flag=True, help="Memory of files and shared memory too, at the PMD size."),
    heat_option,
)

small_option = click.option(
    "--small",
    is_flag=True,
    help="Memory in no whole PMD range of its mapping too. No kernel collapses it: it takes the mechanism move.",
)


def made_of(kind: type[Options], options: dict[str, Any]) -> Options:
    """Return the dataclass `kind` with those of a command's `options` that are its fields."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in options.items() if name in names})


def bounds_options(function: Command) -> Command:
    """Add the options that limit the bloat and the cost of a collapse."""
    # As in plan_options().
    for option in reversed(_BOUNDS_OPTIONS):
        function = option(function)
    return function


_BOUNDS_OPTIONS = (
    click.option(
        "--max-bloat",
        type=BLOAT,
        default=str(DEFAULT_BLOAT),
        show_default=True,
        help="Bytes, or share of the resident memory, that filling may add.",
    ),
    click.option(
        "--max-copied",
        type=AMOUNT,
        help="Bytes, or share of the resident memory, that a collapse may copy; no bound by default. With --heat, the"
        " most used memory comes first.",
    ),
    click.option(
        "--reserve",
        type=AMOUNT,
        help="Memory that stays free below each limit of TARGET's cgroups and of the machine; 10% of the limit by"
        " default, within 64M and 1G.",
    ),
    click.option(
        "--max-threads",
        type=click.IntRange(1),
        metavar="N",
        help="Move memory of a TARGET of up to N threads; by default the number that keeps a stop within 10 times"
        " --max-pause.",
    ),
)
