"""Compare the simulated khugepaged over 4 GiB with nothing to collapse with the real kernel's at full throttle.

Every PMD range lacks its last page, and none may be filled, so both read every entry and then leave the range alone.
Both are timed by their processor time, because other programs run on this machine. Needs root; puts back every value of
sysfs that it changes, and refuses to begin where it cannot.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mthp.geometry import X86_64
from mthp.sim import Machine
from mthp.tunables import Switches, Tunables

SIZE = 4 << 30
SECONDS = 6.0
AIM = 10.0
ROUNDS = 9

THP = Path("/sys/kernel/mm/transparent_hugepage")
THROTTLE = {
    "enabled": "madvise",
    "hugepages-2048kB/enabled": "inherit",
    "khugepaged/max_ptes_none": "0",
    "khugepaged/pages_to_scan": str(1 << 30),
    "khugepaged/scan_sleep_millisecs": "0",
}


@contextlib.contextmanager
def switched(values: dict[str, str]) -> Iterator[None]:
    """Files below the THP directory with other values for a while."""
    before = {name: chosen((THP / name).read_text()) for name in values if (THP / name).exists()}
    try:
        for name in before:
            (THP / name).write_text(values[name])
        yield
    finally:
        # The pace first, so that the thread does not go on at full throttle if anything else fails.
        for name in reversed(before):
            (THP / name).write_text(before[name])


def chosen(text: str) -> str:
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()


def khugepaged() -> int:
    """Return the PID of the kernel's thread."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "comm").read_text() == "khugepaged\n":
                    return int(entry.name)
    sys.exit("this kernel has no khugepaged")


def processor_time(pid: int) -> float:
    """Seconds that a thread has run (schedstat counts nanoseconds; proc_pid_stat(5) clock ticks)."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kernel_rate() -> float:
    """Entries that the kernel's khugepaged looks at in a second of its own."""
    n, page = X86_64.ptes_per_pmd, X86_64.page_size
    with mmap.mmap(-1, SIZE + X86_64.pmd_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = np.frombuffer(memory, np.uint8)
        skew = -view.__array_interface__["data"][0] % X86_64.pmd_size
        pages = view[skew : skew + SIZE].reshape(-1, n, page)
        # Written before it is advised, so that it gets small pages.
        pages[:, : n - 1, 0] = 1
        pid, scans = khugepaged(), THP / "khugepaged/full_scans"
        with switched(THROTTLE):
            memory.madvise(mmap.MADV_HUGEPAGE)
            time.sleep(1)
            before, ran = int(scans.read_text()), processor_time(pid)
            time.sleep(SECONDS)
            rounds, ran = int(scans.read_text()) - before, processor_time(pid) - ran
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        del view, pages
    return rounds * (SIZE // page) / ran


def simulated_rate() -> float:
    """Return the same of the simulated one: the median of some rounds."""
    n, page, start = X86_64.ptes_per_pmd, X86_64.page_size, X86_64.pmd_size
    machine = Machine(
        node_frames=[SIZE // page + 8 * n],
        tunables=Tunables(0, n // 8, n // 2, 1 << 30),
        switches=Switches("madvise", {X86_64.pmd_order: "inherit"}),
    )
    mm = machine.create_mm()
    machine.map(mm, start, start + SIZE)
    addresses = start + np.arange(SIZE // page, dtype=np.int64) * page
    machine.touch(mm, addresses[addresses // page % n != n - 1])
    machine.madvise(mm, start, start + SIZE, "HUGEPAGE")
    daemon, rates = machine.khugepaged, []
    for _ in range(ROUNDS):
        seen, ran = daemon.statistics.progress, time.thread_time()
        daemon.full_scan()
        rates.append((daemon.statistics.progress - seen) / (time.thread_time() - ran))
    assert not daemon.statistics.attempts
    return sorted(rates)[ROUNDS // 2]


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("this measures the kernel's khugepaged at a pace that only root may set")
    kernel, ours = kernel_rate(), simulated_rate()
    ratio = ours / kernel
    verdict = "ok" if ratio >= AIM else "MISSED"
    what = "idle entries a second, simulated khugepaged / the kernel's at full throttle"
    figures = f"{ours / 1e6:.0f} against {kernel / 1e6:.1f} million a second"
    print(f"{what:<76} {ratio:7.1f}  at least {AIM:.0f}: {verdict:<9} {figures}", flush=True)


if __name__ == "__main__":
    main()
