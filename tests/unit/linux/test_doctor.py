"""The doctor's findings on made-up machines, and the parsers that they rest on."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import pytest

from mthp.cli import doctor_command, main
from mthp.errors import NotPermittedError, UnsupportedError
from mthp.freememory import parse_buddyinfo
from mthp.geometry import GEOMETRIES, X86_64, Geometry
from mthp.linux.doctor.examination import examine
from mthp.linux.doctor.findings import Examination, Finding, State
from mthp.linux.memorylimits import parse_meminfo
from mthp.linux.mover.arch import MACHINES
from mthp.linux.probes import UFFD_FEATURE_MOVE, Probed
from mthp.linux.rights import CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_PTRACE, Rights
from mthp.linux.split.file import SplitAbility

THP = "sys/kernel/mm/transparent_hugepage"
ALL_CAPABILITIES = 0x1FF_FFFF_FFFF
FIRST_NAMESPACE = "         0          0 4294967295\n"

EVERYTHING = Probed(
    collapse_known=0,
    collapse=0,
    process_madvise=0,
    pfns=True,
    pagemap_scan=True,
    userfaultfd=0,
    userfaultfd_features=UFFD_FEATURE_MOVE,
    split=SplitAbility(0, orders=True, offset=True, zeroes=True, cold=True),
)
NOTHING = Probed(
    collapse_known=errno.EINVAL,
    collapse=None,
    process_madvise=errno.ENOSYS,
    pfns=False,
    pagemap_scan=False,
    userfaultfd=errno.ENOSYS,
    userfaultfd_features=0,
    split=SplitAbility(errno.ENOENT, mounted=False, cold=False),
)


def status(*, capabilities: int = ALL_CAPABILITIES, uid: int = 0, thp: int = 1) -> str:
    return f"Name:\tmthp\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nCapEff:\t{capabilities:016x}\nTHP_enabled:\t{thp}\n"


MODERN = {
    f"{THP}/enabled": "always [madvise] never\n",
    f"{THP}/hpage_pmd_size": "2097152\n",
    f"{THP}/khugepaged/pages_to_scan": "65536\n",
    f"{THP}/khugepaged/scan_sleep_millisecs": "1000\n",
    f"{THP}/khugepaged/max_ptes_none": "0\n",
    f"{THP}/hugepages-8kB/shmem_enabled": "always inherit within_size advise [never]\n",
    f"{THP}/hugepages-64kB/enabled": "always inherit [madvise] never\n",
    f"{THP}/hugepages-64kB/stats/nr_anon": "3\n",
    f"{THP}/hugepages-64kB/stats/collapse_alloc": "0\n",
    f"{THP}/hugepages-2048kB/enabled": "[always] inherit madvise never\n",
    f"{THP}/hugepages-2048kB/stats/nr_anon": "7\n",
    f"{THP}/hugepages-2048kB/stats/collapse_alloc": "1\n",
    "sys/kernel/mm/damon/admin/kdamonds/nr_kdamonds": "0\n",
    "sys/kernel/mm/page_idle/bitmap": "01234567",
    "proc/self/clear_refs": "",
    "proc/sys/kernel/osrelease": "7.2.0-made-up\n",
    "proc/kpageflags": "01234567",
    "proc/self/status": status(),
    "proc/self/uid_map": FIRST_NAMESPACE,
    "proc/self/cgroup": "0::/work/one\n",
    "proc/meminfo": "MemTotal:       16384 kB\nMemAvailable:    8192 kB\n",
    "proc/buddyinfo": "Node 0, zone   Normal " + " ".join(["1", *["0"] * 8, "1", "3"]) + "\n",
}
"""A machine on which nothing is missing."""

OLD = {
    f"{THP}/enabled": "always [madvise] never\n",
    f"{THP}/hpage_pmd_size": "2097152\n",
    f"{THP}/khugepaged/pages_to_scan": "4096\n",
    f"{THP}/khugepaged/scan_sleep_millisecs": "10000\n",
    "proc/self/status": status(capabilities=0, uid=1000),
    "proc/self/uid_map": FIRST_NAMESPACE,
    "proc/buddyinfo": "Node 0, zone   Normal " + " ".join(["100", "50", *["0"] * 9]) + "\n",
}
"""A kernel of the years before mTHP, seen without rights."""


def write_tree(root: Path, files: Mapping[str, str | None]) -> None:
    for name, text in files.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)


def look(
    root: Path, files: Mapping[str, str | None], probed: Probed = EVERYTHING, geometry: Geometry | None = X86_64
) -> Examination:
    """Examine a machine with these files."""
    write_tree(root, files)
    return examine(sysfs=root / "sys", proc=root / "proc", geometry=geometry, probed=probed)


def finding(examination: Examination, key: str) -> Finding:
    (found,) = (each for each in examination.findings if each.key == key)
    return found


@pytest.fixture(autouse=True)
def _pyarrow_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_where_nothing_is_missing_everything_is_ok(tmp_path: Path) -> None:
    examination = look(tmp_path, MODERN)
    assert {each.key: each.state for each in examination.findings if each.state is not State.OK} == {}
    assert {each.remedy for each in examination.findings} == {""}
    assert examination.kernel == "7.2.0-made-up"
    assert examination.has_thp


def test_an_old_kernel_without_rights(tmp_path: Path) -> None:
    examination = look(tmp_path, OLD, NOTHING)
    states = {each.key: each.state for each in examination.findings}
    assert states == {
        "thp": State.OK,
        "size_switches": State.MISSING,
        "sizes": State.LIMITED,
        "size_stats": State.MISSING,
        "madv_collapse": State.MISSING,
        "process_madvise": State.MISSING,
        "other_processes": State.LIMITED,
        "pfns": State.MISSING,
        "kpageflags": State.MISSING,
        "pagemap_scan": State.MISSING,
        "khugepaged": State.LIMITED,
        "mthp_khugepaged": State.MISSING,
        "lasting": State.LIMITED,
        "free_memory": State.LIMITED,
        "memory_limit": State.OK,
        "snapshot": State.OK,
        "heat_damon": State.MISSING,
        "heat_idle": State.MISSING,
        "heat_young": State.MISSING,
        "split": State.MISSING,
        "split_offset": State.MISSING,
        "split_zeroes": State.MISSING,
        "cold_zeroes": State.MISSING,
        "move_machine": State.OK if platform.machine() in MACHINES else State.MISSING,
        "move_userfaultfd": State.MISSING,
        "move_ptrace": State.LIMITED,
        "move_switches": State.MISSING,
    }
    # What splits alone could do is not had without splits.
    without = [each.key for each in examination.findings if each.state is not State.OK and not each.remedy]
    assert without == ["split_offset", "split_zeroes"]
    assert "CAP_SYS_PTRACE" in finding(examination, "other_processes").remedy
    assert "user 1000" in finding(examination, "other_processes").what
    assert "CAP_SYS_ADMIN" in finding(examination, "pfns").remedy


@pytest.mark.parametrize(
    ("ability", "word"),
    [
        (SplitAbility(errno.ENOENT, mounted=False, cold=True), "mount -t debugfs"),
        (SplitAbility(errno.ENOENT, cold=True), "CONFIG_DEBUG_FS"),
        (SplitAbility(errno.EACCES, cold=True), "root"),
        (SplitAbility(errno.EPERM, cold=True), "lockdown" if os.geteuid() == 0 else "root"),
        (SplitAbility(0, orders=False, offset=False, zeroes=False, cold=False), "6.12"),
        (SplitAbility(0, orders=True, offset=False, zeroes=False, cold=False), "6.12"),
    ],
)
def test_why_folios_cannot_be_split_and_how_to_have_it(tmp_path: Path, ability: SplitAbility, word: str) -> None:
    examination = look(tmp_path, MODERN, dataclasses.replace(EVERYTHING, split=ability))
    found = finding(examination, "split")
    assert found.state is State.MISSING
    assert word in found.remedy
    assert finding(examination, "cold_zeroes").state is (State.OK if ability.cold else State.MISSING)
    with pytest.raises((NotPermittedError, UnsupportedError)) as raised:
        ability.require_split()
    assert raised.value.help == found.remedy


@pytest.mark.parametrize(
    ("word", "state", "words"), [("never", State.MISSING, "no size is on"), ("always", State.LIMITED, "only 64K")]
)
def test_switches_that_may_not_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, state: State, words: str
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    found = finding(look(tmp_path, MODERN | {f"{THP}/hugepages-64kB/enabled": f"[{word}]"}), "move_switches")
    assert found.state is state
    assert words in found.what
    assert "root" in found.remedy


def test_a_kernel_without_thp(tmp_path: Path) -> None:
    examination = look(tmp_path, {"proc/self/status": status()}, NOTHING)
    assert not examination.has_thp
    assert finding(examination, "thp").state is State.MISSING
    assert "CONFIG_TRANSPARENT_HUGEPAGE" in finding(examination, "thp").remedy
    for key in ("sizes", "size_stats", "madv_collapse", "khugepaged", "mthp_khugepaged"):
        assert finding(examination, key).state is State.MISSING


def test_the_geometry_is_the_machine_s(tmp_path: Path) -> None:
    # 512 entries of 8 bytes in a page of 4 KiB; here the kernel says that a PMD entry maps 1 MiB.
    examination = look(tmp_path, MODERN | {f"{THP}/hpage_pmd_size": str(1 << 20)}, geometry=None)
    assert examination.geometry.pmd_size == 1 << 20


@pytest.mark.parametrize(
    ("top", "small", "plain", "advised", "state"),
    [
        ("[always] madvise never", "[inherit]", "64K, 2M", "64K, 2M", State.OK),
        ("always [madvise] never", "[inherit]", "2M", "64K, 2M", State.OK),
        ("always madvise [never]", "[inherit]", "2M", "2M", State.LIMITED),
        ("always madvise [never]", "[always]", "64K, 2M", "64K, 2M", State.OK),
    ],
)
def test_sizes_that_are_on(tmp_path: Path, top: str, small: str, plain: str, advised: str, state: State) -> None:
    examination = look(tmp_path, MODERN | {f"{THP}/enabled": top, f"{THP}/hugepages-64kB/enabled": small})
    sizes = finding(examination, "sizes")
    assert sizes.state is state
    assert sizes.what == f"for plain memory: {plain}; for MADV_HUGEPAGE memory: {advised}"
    assert ("hugepages-64kB/enabled" in sizes.remedy) == (state is State.LIMITED)


def test_shared_memory_sizes_are_no_switches(tmp_path: Path) -> None:
    assert finding(look(tmp_path, MODERN), "size_switches").what == "64K, 2M"


def test_enabled_is_never(tmp_path: Path) -> None:
    thp = finding(look(tmp_path, MODERN | {f"{THP}/enabled": "always madvise [never]"}), "thp")
    assert thp.state is State.LIMITED
    assert "never" in thp.what


def test_thp_is_switched_off_for_the_process(tmp_path: Path) -> None:
    trial = dataclasses.replace(EVERYTHING, collapse=errno.EINVAL)
    examination = look(tmp_path, MODERN | {"proc/self/status": status(thp=0)}, trial)
    assert finding(examination, "thp").state is State.LIMITED
    assert "PR_SET_THP_DISABLE" in finding(examination, "thp").remedy
    assert finding(examination, "madv_collapse").state is State.LIMITED
    assert "PR_SET_THP_DISABLE" in finding(examination, "madv_collapse").remedy


def test_a_word_of_a_later_kernel(tmp_path: Path) -> None:
    examination = look(tmp_path, MODERN | {f"{THP}/hugepages-64kB/enabled": "always [sometimes] never"})
    sizes = finding(examination, "sizes")
    assert sizes.state is State.LIMITED
    assert "sometimes" in sizes.what
    assert finding(examination, "pfns").state is State.OK


@pytest.mark.parametrize(
    ("known", "collapse", "state", "words"),
    [
        (0, errno.ENOMEM, State.LIMITED, ("ENOMEM", "free_memory")),
        (0, errno.EBUSY, State.LIMITED, ("EBUSY", "memory_limit")),
        (0, errno.EAGAIN, State.LIMITED, ("EAGAIN", "again")),
        (0, None, State.OK, ("not tried",)),
        (errno.EINVAL, None, State.MISSING, ("6.1",)),
        (errno.EPERM, None, State.MISSING, ("EPERM", "seccomp")),
    ],
)
def test_madv_collapse(tmp_path: Path, known: int, collapse: int | None, state: State, words: tuple[str, ...]) -> None:
    trial = dataclasses.replace(EVERYTHING, collapse_known=known, collapse=collapse)
    found = finding(look(tmp_path, MODERN, trial), "madv_collapse")
    assert found.state is state
    assert all(word in f"{found.what} {found.remedy}" for word in words)


@pytest.mark.parametrize(
    ("error", "capabilities", "uid_map", "words"),
    [
        (errno.EPERM, 0, FIRST_NAMESPACE, "CAP_SYS_NICE (run as root"),
        (errno.EPERM, 1 << CAP_SYS_NICE, "0 1000 1", "first user namespace"),
        (errno.EPERM, 1 << CAP_SYS_NICE, FIRST_NAMESPACE, "seccomp"),
        (errno.EACCES, 0, FIRST_NAMESPACE, "CAP_SYS_PTRACE"),
        (errno.EINVAL, ALL_CAPABILITIES, FIRST_NAMESPACE, "6.1"),
        (errno.ENOSYS, ALL_CAPABILITIES, FIRST_NAMESPACE, "6.1"),
    ],
)
def test_why_process_madvise_is_refused(
    tmp_path: Path, error: int, capabilities: int, uid_map: str, words: str
) -> None:
    files = {"proc/self/status": status(capabilities=capabilities), "proc/self/uid_map": uid_map}
    found = finding(
        look(tmp_path, MODERN | files, dataclasses.replace(EVERYTHING, process_madvise=error)), "process_madvise"
    )
    assert found.state is State.MISSING
    assert errno.errorcode[error] in found.what
    assert words in found.remedy


def test_process_madvise_could_not_be_tried(tmp_path: Path) -> None:
    found = finding(look(tmp_path, MODERN, dataclasses.replace(EVERYTHING, process_madvise=None)), "process_madvise")
    assert found.state is State.LIMITED


@pytest.mark.parametrize(
    ("scope", "capabilities", "state"),
    [
        (None, 0, State.LIMITED),
        ("0", 0, State.LIMITED),
        ("1", 0, State.LIMITED),
        ("2", 0, State.MISSING),
        ("3", 0, State.MISSING),
        ("2", 1 << CAP_SYS_PTRACE, State.OK),
        ("3", 1 << CAP_SYS_PTRACE, State.MISSING),
    ],
)
def test_attaching_under_yama(tmp_path: Path, scope: str | None, capabilities: int, state: State) -> None:
    files = {"proc/sys/kernel/yama/ptrace_scope": scope, "proc/self/status": status(capabilities=capabilities)}
    examination = look(tmp_path, MODERN | files)
    attaching = finding(examination, "move_ptrace")
    assert attaching.state is state
    # Yama restricts attaching alone.
    looking = finding(examination, "other_processes")
    assert looking.state is (State.OK if capabilities else State.LIMITED)


def test_the_other_capabilities_do_not_count(tmp_path: Path) -> None:
    without = ALL_CAPABILITIES & ~(1 << CAP_SYS_PTRACE)
    examination = look(tmp_path, MODERN | {"proc/self/status": status(capabilities=without)})
    assert finding(examination, "other_processes").state is State.LIMITED


@pytest.mark.parametrize(
    ("error", "features", "state", "words"),
    [
        (0, ~UFFD_FEATURE_MOVE, State.MISSING, "6.8"),
        (errno.EPERM, 0, State.MISSING, "seccomp"),
        (errno.ENOSYS, 0, State.MISSING, "CONFIG_USERFAULTFD"),
        (None, 0, State.LIMITED, ""),
    ],
)
def test_userfaultfd(tmp_path: Path, error: int | None, features: int, state: State, words: str) -> None:
    trial = dataclasses.replace(EVERYTHING, userfaultfd=error, userfaultfd_features=features)
    found = finding(look(tmp_path, MODERN, trial), "move_userfaultfd")
    assert found.state is state
    assert words in found.remedy


def test_khugepaged_s_pace_by_default(tmp_path: Path) -> None:
    # KERNEL.md: 4096 pages every 10 seconds, which is ten minutes for 1 GiB.
    found = finding(look(tmp_path, OLD), "khugepaged")
    assert found.state is State.LIMITED
    assert "64 passes" in found.what
    assert "640 s" in found.what


def test_khugepaged_s_pace_with_pages_of_64k(tmp_path: Path) -> None:
    knobs = {"pages_to_scan": "5000", "scan_sleep_millisecs": "500", "max_ptes_none": "31"}
    files = MODERN | {f"{THP}/khugepaged/{name}": text for name, text in knobs.items()}
    files |= {f"{THP}/hugepages-2048kB/enabled": "[always] inherit madvise never"}
    found = finding(look(tmp_path, files, geometry=GEOMETRIES["ppc64-64k"]), "khugepaged")
    # 16 384 pages in 1 GiB take four passes, the last one short.
    assert "2 s and its own work" in found.what


def test_khugepaged_stands_still(tmp_path: Path) -> None:
    never = "always inherit madvise [never]"
    files = {f"{THP}/hugepages-{size}kB/enabled": never for size in (64, 2048)}
    found = finding(look(tmp_path, MODERN | files), "khugepaged")
    assert found.state is State.LIMITED
    assert "idle" in found.what


@pytest.mark.parametrize(
    ("scope", "when"),
    [("0", "the better way for processes that may not be stopped"), ("3", "the only way to these sizes here, without")],
)
def test_when_it_is_better_to_drive_the_kernel_s_khugepaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, when: str
) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", "7.3", "#1", "x86_64")))
    files = MODERN | {f"{THP}/hugepages-64kB/stats/collapse_alloc": "0", "proc/sys/kernel/yama/ptrace_scope": scope}
    found = finding(look(tmp_path, files), "mthp_khugepaged")
    assert found.state is State.OK
    assert "--mechanism khugepaged" in found.what
    assert when in found.what
    assert ("move_ptrace" in found.what) == (scope == "3")


def test_only_counters_below_the_pmd_size_speak_for_mthp(tmp_path: Path) -> None:
    found = finding(look(tmp_path, MODERN | {f"{THP}/hugepages-64kB/stats/collapse_alloc": None}), "mthp_khugepaged")
    assert found.state is State.MISSING


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = finding(look(tmp_path, MODERN), "snapshot")
    assert found.state is State.LIMITED
    assert "mthp[snapshot]" in found.remedy


def test_free_memory(tmp_path: Path) -> None:
    found = finding(look(tmp_path, MODERN), "free_memory")
    # One block of order 9 and three of order 10, and a single page: 7 folios of order 9.
    assert "node 0: 7 folios of 2M at once, of 14M free" in found.what
    assert "8M are available" in found.what


def test_free_blocks_are_summed_by_node() -> None:
    text = (
        "Node 0, zone      DMA      0      0      1 \n"
        "Node 0, zone   Normal      4      3      2 \n"
        "Node 1, zone   Normal      0      1      0 \n"
    )
    first, second = parse_buddyinfo(text)
    assert (first.node, first.blocks, first.pages) == (0, (4, 3, 3), 22)
    assert [first.folios(order) for order in range(4)] == [22, 9, 3, 0]
    assert (second.node, second.folios(1), second.folios(2)) == (1, 1, 0)
    assert parse_buddyinfo("") == ()


def test_a_field_of_meminfo() -> None:
    assert parse_meminfo("MemFree: 1 kB\nMemAvailable:  12 kB\n", "MemAvailable") == 12 << 10
    assert parse_meminfo("MemFree: 1 kB\n", "MemAvailable") is None


def test_a_memory_limit_is_a_finding(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/work/memory.max": str(2 << 30),
        "sys/fs/cgroup/work/memory.current": str(1 << 30),
        "proc/self/mountinfo": f"31 23 0:28 / {tmp_path}/sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    }
    found = finding(look(tmp_path, MODERN | files), "memory_limit")
    assert found.state is State.LIMITED
    assert "1G of 2G" in found.what


def test_rights(tmp_path: Path) -> None:
    write_tree(tmp_path, {"status": status(capabilities=1 << CAP_SYS_ADMIN, uid=7), "uid_map": "0 7 1"})
    rights = Rights.read(tmp_path)
    assert rights.has(CAP_SYS_ADMIN)
    assert not rights.has(CAP_SYS_NICE)
    assert (rights.fsuid, rights.in_first_namespace) == (7, False)
    assert not Rights.read(tmp_path / "missing").has(CAP_SYS_ADMIN)


@pytest.mark.parametrize(("files", "code"), [(MODERN, 0), (OLD, 0), ({}, 3)])
def test_the_command_s_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: Mapping[str, str],
    code: int,
) -> None:
    examination = look(tmp_path, files, NOTHING)
    monkeypatch.setattr(doctor_command, "examine", lambda: examination)
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    for each in examination.findings:
        (row,) = (number for number, line in enumerate(lines) if each.key in line.split()[1:2])
        assert lines[row].split()[0] == each.state
        assert each.what in lines[row]
        if each.remedy:
            assert each.remedy in lines[row + 1]


def test_the_command_s_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examination = look(tmp_path, OLD, NOTHING)
    monkeypatch.setattr(doctor_command, "examine", lambda: examination)
    assert main(["doctor", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "mthp.doctor/1"
    assert data["geometry"] == {"name": "x86-64", "page_size": 4096, "pmd_order": 9, "pmd_size": 2 << 20}
    assert [Finding(**each | {"state": State(each["state"])}) for each in data["findings"]] == list(
        examination.findings
    )
