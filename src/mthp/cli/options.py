"""Options that several commands share, and how their texts become values."""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click

from mthp.errors import UsageError
from mthp.geometry import parse_size
from mthp.planning import PlanOptions

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
target_argument = click.argument("target")
at_option = click.option(
    "--at",
    metavar="STEP",
    help="Which step of a recording: its number, negative from the end; or a time from its beginning, such as 30s or"
    " 5m. By default the last.",
)


def plan_options(function: Command) -> Command:
    """Add the options that say what shall be planned; :func:`planned` gathers them."""
    for option in reversed(_PLAN_OPTIONS):
        function = option(function)
    return function


_PLAN_OPTIONS = (
    click.option("--policy", default="mainline", show_default=True, metavar="NAME", help="How orders are chosen."),
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
)

PLAN_NAMES = frozenset(f.name for f in dataclasses.fields(PlanOptions))


def planned(options: dict[str, Any]) -> PlanOptions:
    """The :class:`PlanOptions` among a command's `options`."""
    return PlanOptions(**{name: value for name, value in options.items() if name in PLAN_NAMES})


def share_or_size(text: str) -> tuple[float | None, int | None]:
    """Read ``5%`` as (0.05, None), and ``64M`` as (None, bytes).

    Raises:
        UsageError: neither a percentage nor a size.
    """
    if text.endswith("%"):
        return percentage(text), None
    return None, parse_size(text)


def percentage(text: str) -> float:
    """Read ``95%`` or ``95`` as 0.95.

    Raises:
        UsageError: not a number, or not within 0 to 100.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if match is None or float(match[1]) > 100:
        raise UsageError(f"{text!r} is not a percentage", help="write it as 95% or 99.5%, within 0% to 100%")
    # Not divided by 100, which rounds once more: 99.9 would become more than 0.999.
    return float(f"{match[1]}e-2")


@contextmanager
def stopping_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop, which the function that is given tells.

    The work at hand is finished and accounted for. A second one acts as ever.
    """
    wishes: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def wish(number: int, _frame: FrameType | None) -> None:
        wishes.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, wish)
    try:
        yield lambda: bool(wishes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
