"""A target that forks, writes while its child runs, and continues, as Redis does when it saves its data."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import RunningDaemon
from targets import PMD_SIZE
from thp_switches import ThpSwitches
from waiting import until

pytestmark = [
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.requires("root", "thp", "mthp", "pagemap_scan", "4k-pages"),
]

RANGES = 32

TARGET = """
import mmap, os, sys
size, ranges = int(sys.argv[1]), int(sys.argv[2])
memory = mmap.mmap(-1, (ranges + 1) * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, len(memory), 4096):
    memory[at] = 1
memory.madvise(mmap.MADV_HUGEPAGE)
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("fork"):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(write)
            # A daemon forks twice, and its parent ends.
            if "twice" in line and os.fork():
                os._exit(0)
            os.read(read, 1)
            os._exit(0)
        if "twice" in line:
            os.waitpid(child, 0)
        os.close(read)
        for at in range(0, len(memory), size // 4):
            memory[at] = 2
    else:
        os.close(write)
        try:
            os.waitpid(child, 0)
        except ChildProcessError:
            pass
    print("done", flush=True)
"""


@pytest.fixture
def target(thp_switches: ThpSwitches) -> Iterator[subprocess.Popen[str]]:
    thp_switches.set("enabled", "madvise")
    with subprocess.Popen(
        [sys.executable, "-c", TARGET, str(PMD_SIZE), str(RANGES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def tell(target: subprocess.Popen[str], word: str) -> None:
    assert target.stdin is not None
    assert target.stdout is not None
    target.stdin.write(f"{word}\n")
    target.stdin.flush()
    assert target.stdout.readline() == "done\n"


def explained(run_dir: Path, pid: int) -> str:
    command = [sys.executable, "-m", "mthp", "explain", str(pid), "--run-dir", str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def huge_share(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return (int(text.split("AnonHugePages:")[1].split()[0]) << 10) / (RANGES * PMD_SIZE)


def test_coverage_is_back_when_the_child_is_gone_and_nothing_is_collapsed_before(
    tmp_path: Path, target: subprocess.Popen[str]
) -> None:
    arguments = ("--pid", str(target.pid), "--cpu", "100%")
    with RunningDaemon(tmp_path, *arguments) as daemon:
        for word in ("fork", "fork twice"):
            # All of it, and counted: a piece that was begun before the fork may still end after it.
            until(lambda: huge_share(target.pid) >= 1.0, lambda: str(daemon.target(target.pid)))
            time.sleep(1.0)
            tell(target, word)
            assert huge_share(target.pid) < 0.1, "each write broke up a folio"
            made = daemon.collapsed(target.pid)
            # Longer than several looks of the daemon.
            time.sleep(3.0)
            assert daemon.collapsed(target.pid) == made
            assert "since a fork" in explained(tmp_path, target.pid)
            assert huge_share(target.pid) < 0.1
            tell(target, "exit")
            begun = time.monotonic()
            until(lambda: huge_share(target.pid) >= 0.9, lambda: str(daemon.target(target.pid)))
            # The aim is 5 s; a test states no time, because a machine may be busy with other things.
            print(
                f"{huge_share(target.pid):.0%} huge again {time.monotonic() - begun:.2f} s after the end of the child"
            )
