"""Several targets of one command: each is worked on by itself, and its errors are a line of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import click

from mthp.cli.completing import complete_target
from mthp.cli.render.output import console, note
from mthp.cli.render.tables import Table
from mthp.cli.signals import Wish, exit_code
from mthp.engine.space_plan import SpacePlan
from mthp.errors import MthpError, TargetVanishedError, UsageError
from mthp.geometry import Geometry
from mthp.metrics import Coverage
from mthp.targets import Found, Targets, pid_of, refuse_ancestor
from mthp.text import numbered

R = TypeVar("R")

targets_argument = click.argument(
    "targets", nargs=-1, required=True, metavar="TARGET...", shell_complete=complete_target
)


@dataclass(frozen=True, slots=True)
class Failed:
    """A target with an error.

    Attributes:
        label: name of the target.
        error: the error.
    """

    JSON: ClassVar = "target=label error"

    label: str
    error: MthpError


@dataclass(frozen=True, slots=True)
class Each(Generic[R]):
    """The result of each target.

    Attributes:
        results: a result or an error for each target, in their order.
        codes: the exit code of each; that of the command alone if a signal ended it.
        single: whether the user named one PID or file, so that the command is about it alone.
    """

    results: tuple[tuple[Found, R | Failed], ...]
    codes: tuple[int, ...]
    single: bool = False

    @property
    def one(self) -> bool:
        """Whether the result of one target is shown by itself: a name that one process fits is shown as its PID."""
        return len(self.results) == len(self.done) == 1

    @property
    def done(self) -> list[R]:
        """The results of the targets without an error."""
        return [result for _, result in self.results if not isinstance(result, Failed)]

    @property
    def counted(self) -> str:
        """The number of targets for a heading, with the number of results if some have errors."""
        done, every = len(self.done), len(self.results)
        return f"{'' if done == every else f'{done} of '}{numbered(every, 'target')}"

    @property
    def all(self) -> tuple[R | Failed, ...]:
        """The result or error of each target."""
        return tuple(result for _, result in self.results)

    @property
    def code(self) -> int:
        """The exit code of the command: 0, the common one of all targets, or 1."""
        codes = set(self.codes)
        # Without any target the set is empty.
        return codes.pop() if len(codes) == 1 else int(bool(codes))

    def lines(self, line: Callable[[Found, R], Sequence[str]], width: int) -> list[list[str]]:
        """Return the rows of a table: `line` of each result, and the reason at the end of a row of blanks."""
        return [
            [result.label, *[""] * (width - 2), result.error.message]
            if isinstance(result, Failed)
            else list(line(found, result))
            for found, result in self.results
        ]


class Total:
    """The sums of several results; a subclass has properties that :func:`summed` makes."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts


def summed(path: str) -> property:
    """Return a property of a :class:`Total`: the sum of the attribute at `path` of its parts."""

    def figure(total: Total) -> int:
        return sum(map(attrgetter(path), total.parts))

    return property(figure)


def common_share(plans: Sequence[SpacePlan], parts: Sequence[Coverage]) -> float:
    """Return the share of all `parts` together in folios of the sizes that `plans` were requested for."""
    # All have the same options, and so the same smallest order.
    return Coverage.total(parts).share(plans[0].coverage_order) if plans else 0.0


class WithGeometry(Protocol):
    """A result with the geometry of its machine."""

    @property
    def geometry(self) -> Geometry: ...


def print_each(each: Each[Any], table: Table, remarks: Sequence[str] = ()) -> None:
    """Print the table of several targets, remarks on them, and the help of each error once."""
    out = console()
    out.print(table)
    helps = dict.fromkeys(result.error.help for result in each.all if isinstance(result, Failed))
    note(out, [*remarks, *helps])


def common_geometry(results: Iterable[WithGeometry]) -> Geometry:
    """Return the geometry of the machine of all `results`; of this machine if there are none.

    Raises:
        UsageError: their geometries differ, so that they cannot be added up.
    """
    from mthp.linux.sysfs import ThpSysfs

    found = {result.geometry for result in results}
    if len(found) > 1:
        names = " and ".join(sorted(geometry.name for geometry in found))
        raise UsageError(f"the targets are of different machines: {names}", help="name those of one machine")
    return found.pop() if found else ThpSysfs().geometry()


def do_each(
    targets: Targets,
    work: Callable[[Found], tuple[R, int]],
    *,
    changes: bool = False,
    stop: Wish | None = None,
) -> Each[R]:
    """Work on each target.

    Args:
        work: returns a result, and the exit code that a command for it alone would have.
        changes: whether `work` changes the target, so that ancestors of this process are left out.
        stop: called before each target; after it returns True the others are not begun.

    Raises:
        MthpError: the single target that the user named has an error.
    """
    stop = stop or Wish()
    if targets.single:
        found = targets.found[0]
        if changes:
            refuse_ancestor(found.target)
        result, code = work(found)
        return Each(((found, result),), (code,), single=True)
    results: list[tuple[Found, R | Failed]] = []
    codes = []
    for found in targets.found:
        by_name = found.facts is not None
        try:
            if stop():
                # Raised within the try, so that each of the others is listed with the reason.
                raise MthpError("not begun: interrupted")
            if changes:
                _check_ancestor(found)
            result, code = work(found)
        except MthpError as error:
            if isinstance(error, UsageError) and pid_of(found.target) is not None:
                # The process can be used but an option cannot, so the next target would fail in the same way.
                raise
            results.append((found, Failed(found.label, error)))
            code = error.exit_code
        else:
            results.append((found, result))
        # A process that a name found may exit before its turn comes: a line of the table, and not a failure.
        codes.append(0 if by_name and code == TargetVanishedError.exit_code else code)
    results += [(Found(word, word), Failed(word, why)) for word, why in targets.missing]
    codes += [why.exit_code for _, why in targets.missing]
    if stop():
        codes = [exit_code(stop.number)]
    return Each(tuple(results), tuple(codes))


def _check_ancestor(found: Found) -> None:
    """Refuse to change a process on which this one depends; leave it out if a name found it.

    Raises:
        UsageError: the process was named itself.
        TargetVanishedError: a name found the process.
    """
    try:
        refuse_ancestor(found.target)
    except UsageError as error:
        if found.facts is None:
            raise
        # With this class do_each() counts it not as a failure: the shell that mthp was started from fits many a name.
        raise TargetVanishedError(f"left out: {error.message}", help=error.help) from error
