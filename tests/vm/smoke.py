"""Run in a guest each important command of mthp once, on a target that checks its contents.

``python3 -m vm.smoke`` sends the host, for each command, a short sentence of its effect, or ``FAILED`` and why. Needs
nothing but the package and the standard library.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mthp.geometry import Geometry
from mthp.linux.mover.arch import MACHINES
from mthp.linux.sysfs import ThpSysfs
from vm.port import Port

RANGES = 4 if mmap.PAGESIZE == 4096 else 1
"""PMD ranges of the target: 8 MiB, or one range where ranges are larger."""

PATIENCE = 300
"""Seconds for the daemon; under emulation it needs most of them to start."""

TRIES = 3
"""On a busy host single blocks are left as they are, for a moment that was too long: then they are tried again."""

_TARGET = """
import ctypes, mmap, sys
ranges, pmd, page = map(int, sys.argv[1:4])
memory = mmap.mmap(-1, (ranges + 1) * pmd, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
first = -start % pmd
libc = ctypes.CDLL(None)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.madvise(start + first, ranges * pmd, 15)  # MADV_NOHUGEPAGE: base pages, whatever the switches
for i in range(0, ranges * pmd, page):
    memory[first + i:first + i + 8] = (i + 1).to_bytes(8, "little")
libc.madvise(start + first, ranges * pmd, 14)
print(start + first, flush=True)
for line in sys.stdin:
    wrong = sum(memory[first + i:first + i + 8] != (i + 1).to_bytes(8, "little") for i in range(0, ranges * pmd, page))
    print("intact" if not wrong else f"{wrong} pages are wrong", flush=True)
"""


class _Target:
    """A process with a few PMD ranges of written base pages."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        assert process.stdout
        self.address = int(process.stdout.readline())

    def check(self) -> str:
        """Return ``intact``, or the difference."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("check\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@contextlib.contextmanager
def _target() -> Iterator[_Target]:
    pmd = ThpSysfs().geometry().pmd_size
    command = [sys.executable, "-c", _TARGET, str(RANGES), str(pmd), str(mmap.PAGESIZE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Target(process)
        finally:
            process.kill()


def _mthp(*arguments: object, codes: tuple[int, ...] = (0,)) -> dict[str, Any]:
    words = [str(argument) for argument in arguments]
    command = [sys.executable, "-m", "mthp", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise AssertionError(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def doctor() -> str:
    """Return the abilities that are not ok here."""
    checks = _mthp("doctor")["findings"]
    found = {check["key"]: check for check in checks}
    # From 7.2 on khugepaged collapses to all sizes, and doctor says when it is better to have it do so.
    drivable = tuple(map(int, platform.release().split(".")[:2])) >= (7, 2)
    assert (found["mthp_khugepaged"]["state"] == "ok") == drivable, found["mthp_khugepaged"]
    assert ("--mechanism khugepaged" in found["mthp_khugepaged"]["what"]) == drivable, found["mthp_khugepaged"]
    lacking = [check["key"] for check in checks if check["state"] == "missing"]
    return f"{len(checks)} checks, missing {', '.join(lacking) or 'none'}"


def inspect() -> str:
    """Return the orders that are seen."""
    with _target() as target:
        _mthp("inspect", target.pid)
    return "ok"


def plan() -> str:
    """Return how much of the target would be collapsed."""
    with _target() as target:
        answer = _mthp("plan", target.pid)
    planned = sum(answer["folios_by_order"].values())
    assert planned, answer["folios_by_order"]  # the kernel's khugepaged may have been at some
    return "ok"


def collapse() -> str:
    """Collapse the target to the PMD order."""
    with _target() as target:
        answer = _mthp("collapse", target.pid, "--orders", _pmd_label(), codes=(0, 1))
        assert answer["collapsed_ranges"] + answer["unchanged_ranges"] >= RANGES, answer["failed_ranges"]
        assert target.check() == "intact"
        huge = _anon_huge_kb(target)
    assert huge >= RANGES * ThpSysfs().geometry().pmd_size >> 10, huge
    return "ok"


def move() -> str:
    """Collapse the target to folios much smaller than a PMD range, by moving pages."""
    with _only(None):
        return _to_small_folios("move")


def daemon() -> str:
    """Let the daemon do the same; to the PMD order where pages cannot be moved."""
    with _only(None), _target() as target, tempfile.TemporaryDirectory() as directory:
        geometry, order, label = _small()
        words = ["--pid", target.pid, "--cpu", "100%", "--run-dir", directory]
        if platform.machine() in MACHINES:
            words += ["--mechanism", "move"]
        else:
            order, label = geometry.pmd_order, _pmd_label()
        words += ["--orders", label]
        command = [sys.executable, "-m", "mthp", "daemon", *map(str, words)]
        begin = time.monotonic()
        made, wanted = 0, RANGES * geometry.ptes_per_pmd >> order
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                while made < _most(wanted) and process.poll() is None and time.monotonic() < begin + PATIENCE:
                    time.sleep(1)
                    made = _folios(target, order)
            finally:
                process.terminate()
            said, _ = process.communicate()
        assert target.check() == "intact"
        if why := _not_here(process.returncode, said):
            return why
        assert process.returncode == 0, (process.returncode, said[-300:])
        assert made >= _most(wanted), (made, wanted, said[-300:])
    return f"ok: {made} folios of {label}"


def khugepaged() -> str:
    """Do the same by the kernel's khugepaged, and put its switches back."""
    # It has to know the target, and so some size has to be on; the smallest spoils nothing.
    with _only(2):
        before = _switches()
        said = _to_small_folios("khugepaged")
        assert _switches() == before, "switches were not put back"
    return said


@contextlib.contextmanager
def _only(order: int | None) -> Iterator[None]:
    """No size on but that of `order`, for memory with MADV_HUGEPAGE: khugepaged by itself makes nothing larger."""
    thp = ThpSysfs()
    directories = thp.size_directories(mmap.PAGESIZE)
    files = {size: path / "enabled" for size, path in directories.items() if (path / "enabled").exists()}
    words = {file: file.read_text().partition("[")[2].partition("]")[0] for file in files.values()}
    for size, file in files.items():
        file.write_text("madvise" if size == order else "never")
    try:
        yield
    finally:
        for file, word in words.items():
            file.write_text(word)


def _to_small_folios(mechanism: str) -> str:
    geometry, order, label = _small()
    wanted = RANGES * geometry.ptes_per_pmd >> order
    with _target() as target:
        words = ("collapse", target.pid, "--orders", label, "--mechanism", mechanism)
        for _ in range(TRIES):
            done = subprocess.run(
                [sys.executable, "-m", "mthp", *map(str, words), "--json"], capture_output=True, text=True, check=False
            )
            assert target.check() == "intact"
            if why := _not_here(done.returncode, done.stdout + done.stderr):
                return why
            made = _folios(target, order)
            if made >= _most(wanted):
                break
    assert made >= _most(wanted), (done.returncode, made, wanted, done.stdout[-600:], done.stderr[-300:])
    return f"ok: {made} folios of {label}"


def _most(wanted: int) -> int:
    """Nine in ten of them, and at least one: single blocks may be left, for a page that is on its way somewhere."""
    return -(-wanted * 9 // 10)


def _small() -> tuple[Geometry, int, str]:
    """Return the geometry, the order of the small folios, and its label: 64K on x86-64, 1M on arm64 with 16K pages."""
    geometry = ThpSysfs().geometry()
    order = max(2, geometry.pmd_order - 5)
    return geometry, order, geometry.label(order)


def _not_here(code: int, said: str) -> str:
    """Return why this kernel lacks an ability that a command needs; empty if it has it."""
    if refused := re.search(f"the mover does not know {platform.machine()}", said):
        return f"not here: {refused[0]}"
    if code == 3:
        return f"not here: {said.strip().splitlines()[-1][:60] if said.strip() else 'no reason given'}"
    if code in (0, 1) and not ThpSysfs().size_directories(mmap.PAGESIZE):
        return "not here: no switches by size"
    return ""


def _folios(target: _Target, order: int) -> int:
    """Folios of an order that the target has."""
    found: int = _mthp("inspect", target.pid)["total"]["pages_by_order"].get(str(order), 0)
    return found >> order


def _switches() -> dict[str, str]:
    root = ThpSysfs().root
    files = [*root.glob("hugepages-*kB/enabled"), *root.glob("khugepaged/[ps]*_*"), root / "khugepaged/max_ptes_none"]
    names = [file for file in files if file.name not in {"pages_collapsed", "full_scans"}]
    return {str(file): file.read_text() for file in names}


def _pmd_label() -> str:
    geometry = ThpSysfs().geometry()
    return geometry.label(geometry.pmd_order)


def _anon_huge_kb(target: _Target) -> int:
    text = Path(f"/proc/{target.pid}/smaps_rollup").read_text()
    return int(text.partition("AnonHugePages:")[2].split()[0])


COMMANDS: dict[str, Callable[[], str]] = {
    "doctor": doctor,
    "inspect": inspect,
    "plan": plan,
    "collapse": collapse,
    "move": move,
    "daemon": daemon,
    "khugepaged": khugepaged,
}


def silence() -> mmap.mmap:
    """Keep the kernel's khugepaged away from the targets, and return memory to keep until the end.

    It sleeps for its whole rest only while its list has a process: the first process on an empty list wakes it
    (__khugepaged_enter(), mm/khugepaged.c). So this process stays on the list, with a mapping of its own.
    """
    memory = mmap.mmap(-1, 2 * ThpSysfs().geometry().pmd_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    # To write this wakes it a last time.
    (ThpSysfs().root / "khugepaged/scan_sleep_millisecs").write_text("1000000000")
    time.sleep(1)
    return memory


def main() -> int:
    """Run all commands, report each, and return 1 if one failed."""
    port = Port()
    kept = silence()
    bad = 0
    for name, command in COMMANDS.items():
        try:
            said = command()
        except (AssertionError, OSError, KeyError, ValueError) as error:
            said = f"FAILED: {error!r}"
            bad = 1
        print(f"{name}: {said}", flush=True)
        port.tell(command=name, said=said)
    kept.close()
    return bad


if __name__ == "__main__":
    sys.exit(main())
