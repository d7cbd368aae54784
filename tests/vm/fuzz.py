"""Real against simulated: random cases are recorded and replayed at once; what differs is made small and kept."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mthp.sim.golden.conformance import CaseReport, replay_case
from vm.apt import LabError
from vm.cases import random_specs, shrunk
from vm.corners import corner_specs
from vm.kernels import Kernel
from vm.recorder import Recorder, RefusedError, Spec, recorder
from vm.splits import split_specs

GUEST_SECONDS = 1800
"""Seconds after which a fresh guest replaces one."""

SHRINK_SECONDS = 60
"""Seconds for making a case smaller after the time is over."""

KINDS: dict[str, Callable[..., Iterator[Spec]]] = {
    "random": random_specs,
    "corners": corner_specs,
    "split": split_specs,
}
"""What draws the cases of each kind."""

Say = Callable[[str], None]


@dataclass
class Findings:
    """The result of a run.

    Attributes:
        cases: golden cases, all that were recorded.
        mismatches: of those that differ, the smallest variant: the case, and how it differs.
        refused: how often a case could not be staged, by the reason.
        unstable: cases that differed, and did not when recorded once more: as first recorded, and how they differed.
        states: cases in which a state occurs.
    """

    cases: list[dict[str, Any]] = field(default_factory=list)
    mismatches: list[tuple[dict[str, Any], CaseReport]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    unstable: list[tuple[dict[str, Any], CaseReport]] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)

    @property
    def summary(self) -> str:
        """Return a line in the form of the replay's."""
        differing = len(self.mismatches)
        others = f", refused {self.refused.total()}" if self.refused else ""
        others += f", unstable {len(self.unstable)}" if self.unstable else ""
        return f"cases {len(self.cases)}, match {len(self.cases) - differing}, mismatch {differing}{others}"


def fuzz(
    kernel: Kernel, *, seed: int, cases: int, seconds: float, say: Say, kind: str = "random", shrink: bool = True
) -> Findings:
    """Record random cases, up to a number and a time.

    Args:
        kernel: what to record.
        seed: of all random numbers; the same kernel and seed lead to the same cases.
        cases: the largest number.
        seconds: the time limit.
        say: called with progress and every difference.
        kind: of cases: a word of :data:`KINDS`.
        shrink: look for the smallest case that still differs.

    Raises:
        LabError: the guest does not come up.
    """
    found = Findings()
    end = time.monotonic() + seconds
    said = time.monotonic()
    with ExitStack() as stack:
        lab = _Lab(kernel, stack, seconds)
        for number, spec in enumerate(_specs(kernel, lab, seed, kind)):
            if len(found.cases) >= cases or time.monotonic() > end:
                break
            _one(lab, spec, f"{kernel.version}-{seed}-{number}", found, say, end + SHRINK_SECONDS if shrink else 0)
            if time.monotonic() - said > 10:
                said = time.monotonic()
                say(f"{kernel.name}: {found.summary}")
    return found


class _Lab:
    """A recorder, replaced when its guest is gone."""

    def __init__(self, kernel: Kernel, stack: ExitStack, seconds: float) -> None:
        self._kernel = kernel
        self._stack = stack
        self._seconds = min(seconds + 120, GUEST_SECONDS)
        self._recorder = self._boot()
        self.geometry = self._recorder.geometry

    def _boot(self) -> Recorder:
        return self._stack.enter_context(recorder(self._kernel, self._seconds))

    def record(self, spec: Spec, name: str) -> dict[str, Any]:
        """Record a case, and return it as a golden case.

        Raises:
            RefusedError: it cannot be staged, or the guest died.
        """
        try:
            return self._recorder.record(spec, name)
        except (LabError, OSError) as error:
            self._stack.close()
            self._recorder = self._boot()
            raise RefusedError(f"the guest is gone: {str(error)[-200:]}") from error


def _specs(kernel: Kernel, lab: _Lab, seed: int, kind: str) -> Iterator[Spec]:
    series = tuple(int(number) for number in kernel.version.split(".")[:2])
    without = set()
    if series < (6, 15):
        without |= {"guard"}  # MADV_GUARD_INSTALL is of 6.13, and pagemap shows guards since 6.15
    if kernel.platform.machine == "ppc64le":
        without |= {"uffdwp", "uffd_zero", "uffd_swap", "uffd_marker"}  # no write-protection by userfaultfd there
    if not kernel.modules:
        without |= {"swap", "swap_shared", "swapcache", "swapped_back", "uffd_swap"}  # and no swap
    if kind == "split" and series < (6, 18):
        without |= {"swapcache"}  # staged by a fork, which leaves no PTE that may be written; the collapse wants one
    return KINDS[kind](lab.geometry, seed, mthp=series >= (7, 2), without=frozenset(without))


def _one(lab: _Lab, spec: Spec, name: str, found: Findings, say: Say, shrink_until: float) -> None:
    try:
        case = lab.record(spec, name)
        report = replay_case(case)
        if report.mismatches:
            first = case, report
            case = lab.record(spec, name)
            report = replay_case(case)
            if not report.mismatches:
                found.unstable.append(first)
                _tell(*first, "differs, and not when recorded once more", say)
    except RefusedError as error:
        found.refused[str(error)] += 1
        return
    found.cases.append(case)
    found.states.update({state.rstrip("~").partition(":")[0] for state in spec.states})
    if not report.mismatches:
        return
    smallest, report = _shrunk(lab, spec, name, case, report, shrink_until)
    found.mismatches.append((smallest, report))
    _tell(smallest, report, "differs", say)


def _tell(case: dict[str, Any], report: CaseReport, what: str, say: Say) -> None:
    say(f"case {case['id']} {what}: {json.dumps(case['before'])}, orders {case['orders_enabled']}")
    for mismatch in report.mismatches:
        say(f"  {mismatch.where}\n    kernel:    {mismatch.expected}\n    simulated: {mismatch.got}")


def _shrunk(
    lab: _Lab, spec: Spec, name: str, case: dict[str, Any], report: CaseReport, until: float
) -> tuple[dict[str, Any], CaseReport]:
    """Return the smallest variant found in time that differs in the same respect."""
    best = (case, report)
    kind = report.mismatches[0].where.partition(": ")[2]

    def differs(candidate: Spec) -> bool:
        nonlocal best
        if time.monotonic() > until:
            return False
        try:
            recorded = lab.record(candidate, f"{name}-small")
        except RefusedError:
            return False
        replayed = replay_case(recorded)
        same = any(mismatch.where.endswith(kind) for mismatch in replayed.mismatches)
        if same:
            best = (recorded, replayed)
        return same

    shrunk(spec, differs)
    return best


def write_cases(path: Path, cases: list[dict[str, Any]]) -> None:
    """Write golden cases: JSON lines, compressed if the name ends in ``.gz``; the same cases make the same bytes."""
    text = "".join(json.dumps(case, separators=(",", ":")) + "\n" for case in cases)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)
