"""The library's verbs: one function for each command."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mthp.buffers import memory_of
from mthp.engine.census import Census, take_census
from mthp.engine.collapse import carry_out, collapse_space
from mthp.engine.explain import Explanation, explain_space
from mthp.engine.planning import plan_blocks, plan_space
from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.engine.trim import TrimOptions, TrimReport, trim_space
from mthp.engine.verify import Expectation, Verification, verify_space
from mthp.errors import UsageError
from mthp.means import Means
from mthp.targets import Target, open_target, refuse_ancestor, resolve

if TYPE_CHECKING:
    from mthp.lab.compare import Comparison
    from mthp.lab.sweep import SweepReport
    from mthp.snapshot.description import SnapshotInfo
    from mthp.snapshot.recorder import Recorded

_PLAN_FIELDS = frozenset(f.name for f in dataclasses.fields(PlanOptions))


def inspect(target: Target, *, zero_filled: bool = False) -> Census:
    """Count the pages of `target` by folio order, per mapping and in all.

    Args:
        target: a PID, ``"self"``, or the path of a snapshot.
        zero_filled: also read the contents, and count the pages that contain only zeroes.

    Raises:
        UsageError, TargetVanishedError, NotPermittedError, UnsupportedError: as
            :func:`mthp.targets.open_target`.
    """
    with open_target(target) as space:
        return take_census(space, zero_filled=zero_filled)


def plan(target: Target, **options: Any) -> SpacePlan:
    """Plan the collapse of `target`, without changing anything.

    Args:
        target: a PID, ``"self"``, or the path of a snapshot.
        options: the fields of :class:`mthp.engine.select.PlanOptions`.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`; or an option does not exist.
        TargetVanishedError, NotPermittedError, UnsupportedError: as :func:`mthp.targets.open_target`.
    """
    with open_target(target) as space:
        return plan_space(space, _plan_options(options))


def collapse(target: Target, *, dry_run: bool = False, **options: Any) -> CollapseReport:
    """Plan and collapse `target` now, and return the report.

    Args:
        target: a PID, or ``"self"``.
        dry_run: plan only.
        options: the fields of :class:`mthp.engine.select.PlanOptions` and :class:`mthp.means.Means`.

    Raises:
        UsageError: as :func:`plan`; or `target` is an ancestor of this process.
        TargetVanishedError, NotPermittedError, UnsupportedError: as :func:`mthp.engine.collapse.collapse_space`.
    """
    target = resolve(target)
    # A window of the mover stops its target, and a stopped shell or terminal would stop this process with it.
    refuse_ancestor(target)
    with open_target(target) as space:
        return collapse_space(space, *_options(options), dry_run=dry_run)


def trim(target: Target, *, dry_run: bool = False, **options: Any) -> TrimReport:
    """Give back pages of large folios of `target` that contain only zeroes.

    Args:
        target: a PID, or ``"self"``.
        dry_run: plan only.
        options: the fields of :class:`mthp.engine.trim.TrimOptions`.

    Raises:
        UsageError: an option does not exist, or is out of range.
        TargetVanishedError, NotPermittedError, UnsupportedError: as :func:`mthp.engine.trim.trim_space`.
    """
    try:
        chosen = TrimOptions(**options)
    except TypeError as error:
        raise UsageError(str(error).replace("TrimOptions.__init__()", "trim options:")) from None
    with open_target(target) as space:
        return trim_space(space, chosen, dry_run=dry_run)


def verify(target: Target, *expectations: str) -> Verification:
    """Check that the memory of `target` lies in folios as expected.

    Args:
        target: a PID, ``"self"``, the path of a snapshot, or a name that fits one process.
        expectations: such as ``"2M>=95%"`` or ``"heap:64K>=90%"`` (:mod:`mthp.engine.verify`).

    Raises:
        UsageError: no expectation, a text that is not one, or a size that no folio has there.
        TargetVanishedError, NotPermittedError, UnsupportedError: as :func:`mthp.targets.open_target`.
    """
    if not expectations:
        # Without one every target would pass.
        raise UsageError("no expectation was given", help='write verify(target, "2M>=95%")')
    expected = [Expectation.parse(each) for each in expectations]
    with open_target(target) as space:
        return verify_space(space, expected)


def explain(target: Target, address: int | None = None) -> Explanation:
    """Explain the memory of `target`: its kind, what each policy would make of it, and what stops it.

    Args:
        target: a PID, ``"self"``, the path of a snapshot, or a name that fits one process.
        address: explain the PMD range around it; by default the whole process.

    Raises:
        UsageError: nothing is mapped there.
        TargetVanishedError, NotPermittedError, UnsupportedError: as :func:`mthp.targets.open_target`.
    """
    with open_target(target) as space:
        return explain_space(space, address)


def take_snapshot(target: Target, path: str | os.PathLike[str], *, overwrite: bool = False) -> SnapshotInfo:
    """Record which pages of `target` are mapped, and how, into a file that every verb takes as a target.

    ``mthp.snapshot(target, path)`` does the same, but type checkers see a package of that name.

    Args:
        target: a PID, ``"self"``, a name that fits one process, or a path of a recording (its last step).
        path: path of the file, Parquet.
        overwrite: replace a file that exists.

    Raises:
        UsageError, MthpError, UnsupportedError: as :func:`mthp.snapshot.record.record`.
        TargetVanishedError, NotPermittedError: as :func:`mthp.targets.open_target`.
    """
    from mthp.snapshot.record import record

    with open_target(target) as space:
        return record(space, path, overwrite=overwrite)


def record(
    target: Target,
    path: str | os.PathLike[str],
    *,
    every: float = 1.0,
    duration: float | None = None,
    cpu: float | None = 0.02,
    stop: Callable[[], bool] = lambda: False,
    overwrite: bool = False,
) -> Recorded:
    """Record `target` over time, until the duration is over, it exits, or `stop` returns True.

    Args:
        every: seconds from one step to the next.
        duration: seconds; None for no end.
        cpu: the share of one processor that recording may take; None for no bound.

    Raises:
        UsageError, MthpError, UnsupportedError: as :func:`mthp.snapshot.recorder.record_series`.
        TargetVanishedError, NotPermittedError: as :func:`mthp.targets.open_target`.
    """
    from mthp.snapshot.recorder import Pace, record_series

    with open_target(target) as space:
        return record_series(space, path, Pace(every, duration, cpu), stop=stop, overwrite=overwrite)


def compare(target: Target, policies: Sequence[str] = (), *, scans: int | None = 1, **limits: Any) -> Comparison:
    """Compute side by side what several policies would make of `target`.

    Args:
        policies: their names, or one name; by default :data:`mthp.lab.compare.DEFAULT_POLICIES`.
        scans: times that each policy's plan is carried out in memory and planned again; None: until nothing changes.
        limits: lists of values of max_ptes_none, max_ptes_swap, max_ptes_shared, mthp_min_order and orders.

    Raises:
        UsageError: as :func:`mthp.lab.compare.compare`.
        TargetVanishedError, NotPermittedError, UnsupportedError: as :func:`mthp.targets.open_target`.
    """
    # Imported here and below, because `import mthp` must not load what only some verbs need.
    from mthp.lab.compare import DEFAULT_POLICIES, settings_of
    from mthp.lab.compare import compare as compare_space

    # A text is a sequence, too, of letters.
    names = [policies] if isinstance(policies, str) else policies
    settings = settings_of(names or DEFAULT_POLICIES, **limits)
    with open_target(target) as space:
        return compare_space(space, settings, scans=scans)


def sweep(
    directory: str | os.PathLike[str],
    grid: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    overwrite: bool = False,
) -> SweepReport:
    """Run all snapshots and recordings in a directory through all settings of a grid, into one Parquet file.

    Args:
        grid: a TOML file, as for `mthp sweep`.
        jobs: processes; by default as many as this one may use processors.

    Raises:
        UsageError, MthpError, UnsupportedError: as :func:`mthp.lab.sweep.sweep`.
    """
    from mthp.lab import runners
    from mthp.lab.grid import read_grid
    from mthp.lab.sweep import inputs_in
    from mthp.lab.sweep import sweep as sweep_inputs

    return sweep_inputs(inputs_in(directory), read_grid(grid), output, runners.local(jobs), overwrite=overwrite)


def collapse_self(*, dry_run: bool = False, **options: Any) -> CollapseReport:
    """Collapse this process itself, while its other threads run.

    MADV_COLLAPSE makes folios of the PMD order. ``mechanism="madvise,move"`` also makes smaller ones, by moving pages
    behind a userfaultfd: a thread that touches a moving page waits for it, and no thread is traced or stopped
    (:mod:`mthp.linux.mover.guarded`). :func:`collapse_buffer` lists the requirements.

    Args:
        dry_run, options: as for :func:`collapse`.

    Raises:
        UsageError, NotPermittedError, UnsupportedError: as :func:`collapse`.
    """
    return collapse("self", dry_run=dry_run, **options)


def collapse_buffer(
    buffer: Any, order: int | None = None, *, guarded: bool = True, dry_run: bool = False, **options: Any
) -> CollapseReport:
    """Collapse memory of this process: a NumPy array, an mmap or another buffer.

    Without `order`, all contents in whole PMD ranges within the buffer are collapsed to the PMD order, shared memory
    too (which an mmap is by default), unless `options` say otherwise. That needs no rights. There is no bloat budget by
    default, because the caller named the memory; the reserve holds.

    With `order`, every aligned run of 2**order pages within the buffer becomes one folio, if it is private memory and
    full, or may be filled. Other threads may use the memory meanwhile, also in system calls. Requirements:

    - the switch of that size: as root it is turned on for the time; without rights it must be on;
    - a userfaultfd that handles faults in the kernel, which users have with CAP_SYS_PTRACE or with
      ``vm.unprivileged_userfaultfd=1``. Without it, ``guarded=False`` works while no other thread uses the memory;
    - x86-64, and Linux 6.8.

    Args:
        buffer: contiguous memory of this process: an object with the buffer protocol or ``__array_interface__``, a
            tensor of DLPack, or an Arrow array (its largest buffer is used).
        order: order of the folios; None for the PMD order.
        guarded: whether other threads may use the memory meanwhile.
        dry_run: plan only.
        options: as for :func:`collapse`; with `order` only those of :class:`mthp.means.Means`.

    Raises:
        UsageError: a buffer that is not contiguous; an order that does not exist; as :func:`plan`.
        NotPermittedError: the switch is off, or the guard is not permitted.
        UnsupportedError: as :func:`mthp.engine.collapse.collapse_space`.
    """
    start, size = memory_of(buffer)
    if order is not None:
        return _collapse_blocks(start, size, order, guarded, dry_run, options)
    chosen: dict[str, Any] = {
        "policy": "pmd-only",
        "trigger": "madvise",
        "include_file": True,
        "within": (start, start + size),
        # The caller named this memory, so filling it is wanted.
        "max_bloat": None,
    }
    with open_target("self") as space:
        return collapse_space(space, *_options(chosen | options), dry_run=dry_run)


def _collapse_blocks(
    start: int, size: int, order: int, guarded: bool, dry_run: bool, options: dict[str, Any]
) -> CollapseReport:
    """Collapse every block of `order` within some memory of this process."""
    from mthp.linux.live import open_live

    unknown = options.keys() & _PLAN_FIELDS
    if unknown:
        raise UsageError(f"{', '.join(sorted(unknown))}: with an order, nothing is left to be planned")
    # The caller named this memory and this size, which counts as naming the mover.
    _, means = _options({"mechanism": "madvise,move", "max_bloat": None} | options)
    with open_live("self") as space:
        space.guarded = guarded
        plan = plan_blocks(space, start, start + size, order)
        return carry_out(space, plan, means, dry_run=dry_run)


def _plan_options(options: dict[str, Any]) -> PlanOptions:
    try:
        return PlanOptions(**options)
    except TypeError as error:
        raise UsageError(str(error).replace("PlanOptions.__init__()", "plan options:")) from None


def _options(options: dict[str, Any]) -> tuple[PlanOptions, Means]:
    """Split keyword arguments into what to choose, and how to do it."""
    choice = _plan_options({name: value for name, value in options.items() if name in _PLAN_FIELDS})
    try:
        return choice, Means(**{name: value for name, value in options.items() if name not in _PLAN_FIELDS})
    except TypeError as error:
        raise UsageError(str(error).replace("Means.__init__()", "collapse options:")) from None
