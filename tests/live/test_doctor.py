"""The doctor's trials on this machine's kernel: they are right, and leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mthp.linux.doctor.examination import examine
from mthp.linux.doctor.findings import Examination, State
from mthp.linux.probes import probe, probe_collapse, probe_process_madvise, probe_userfaultfd
from mthp.linux.sysfs import ThpSysfs
from thp_switches import THP_ROOT, ThpSwitches, size_name

pytestmark = pytest.mark.live


def what(examination: Examination, key: str) -> str:
    return next(finding.what for finding in examination.findings if finding.key == key)


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def children() -> list[str]:
    """PIDs of the children of this process, other tests' among them."""
    return sorted(pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split())


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


def switch_texts() -> dict[Path, str]:
    names = {"enabled", "shmem_enabled", "defrag", "pages_to_scan", "scan_sleep_millisecs", "max_ptes_none"}
    return {path: path.read_text() for path in THP_ROOT.rglob("*") if path.name in names}


@pytest.mark.requires("thp")
@pytest.mark.usefixtures("thp_switches")
def test_trials_leave_nothing_behind() -> None:
    geometry = ThpSysfs().geometry()
    probe(geometry)
    before, family = (descriptors(), switch_texts()), children()
    size = virtual_bytes()
    for _ in range(3):
        probe(geometry)
    assert (descriptors(), switch_texts()) == before
    # A trial that kept its memory would have kept twice the PMD size each time.
    assert virtual_bytes() - size < geometry.pmd_size
    assert children() == family


@pytest.mark.requires("thp")
@pytest.mark.parametrize("word", ["always", "madvise", "never"])
def test_the_trial_of_madv_collapse_really_collapses(thp_switches: ThpSwitches, word: str) -> None:
    thp_switches.set("enabled", word)
    thp_switches.only(f"{ThpSysfs().geometry().pmd_size >> 10}kB", word="inherit")
    sysfs = ThpSysfs()
    before = sysfs.vmstat()
    assert probe_collapse(sysfs.geometry()) == 0
    after = sysfs.vmstat()
    # Memory that is huge already needs no new folio.
    assert after["thp_collapse_alloc"] > before["thp_collapse_alloc"]


@pytest.mark.requires("pfns")
def test_with_all_rights() -> None:
    assert probe_process_madvise() == 0
    examination = examine()
    states = {finding.key: finding.state for finding in examination.findings}
    assert {states[key] for key in ("pfns", "kpageflags", "other_processes", "process_madvise")} == {State.OK}
    assert examination.kernel == os.uname().release
    assert examination.geometry == ThpSysfs().geometry()


@pytest.mark.requires("pagemap_scan")
def test_pagemap_scan_is_found() -> None:
    assert probe(ThpSysfs().geometry()).pagemap_scan


def test_userfaultfd_tells_features_only_if_it_works() -> None:
    error, features = probe_userfaultfd()
    assert (features != 0) == (error == 0)


@pytest.mark.requires("mthp")
def test_sizes_are_those_that_are_on(thp_switches: ThpSwitches) -> None:
    label = ThpSysfs().geometry().label
    thp_switches.only(size_name(4), size_name(6))
    assert what(examine(), "sizes") == f"for plain memory: none; for MADV_HUGEPAGE memory: {label(4)}, {label(6)}"
    thp_switches.set(f"hugepages-{size_name(5)}/enabled", "always")
    assert what(examine(), "sizes") == (
        f"for plain memory: {label(5)}; for MADV_HUGEPAGE memory: {label(4)}, {label(5)}, {label(6)}"
    )
