"""The demo's workload as a real process: its memory, its answers across a collapse, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mthp.demo.client import Workload
from mthp.errors import TargetVanishedError, UsageError
from mthp.linux.live import open_live
from mthp.progress import StepProgress
from thp_switches import ThpSwitches
from waiting import PATIENCE, wait_for

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("thp_switches")]

SIZE = 96 << 20


@pytest.fixture
def workload() -> Iterator[Workload]:
    with Workload() as workload:
        workload.start(SIZE)
        yield workload


def status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(key + ":"))


def ends(pid: int) -> bool:
    """Return whether the process ends. A zombie has ended, too."""

    def has_ended() -> bool:
        try:
            return status(pid, "State").startswith("Z")
        except (FileNotFoundError, ProcessLookupError):
            return True

    return wait_for(has_ended)


def smaps(pid: int, key: str) -> int:
    """Bytes of a kind that the whole process has, as the kernel adds them up."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":"))) << 10


def test_size_name_and_holes(workload: Workload) -> None:
    assert Path(f"/proc/{workload.pid}/comm").read_text() == "mthp-demo\n"
    anonymous = smaps(workload.pid, "Anonymous")
    assert abs(anonymous - SIZE) < SIZE * 0.1
    with open_live(workload.pid) as space:
        [heap] = [vma for vma in space.vmas() if vma.name == "[heap]"]
    assert 0.15 < 1 - anonymous / heap.size < 0.5


@pytest.mark.requires("thp")
def test_small_pages_even_where_thp_is_always_on(thp_switches: ThpSwitches) -> None:
    thp_switches.set("enabled", "always")
    with Workload() as workload:
        seen: set[str] = set()
        workload.start(SIZE, lambda done, total, phase: seen.add(status(workload.pid, "THP_enabled")))
        assert smaps(workload.pid, "AnonHugePages") == 0
        assert seen == {"0"}  # as proc_pid_status(5) says it: disabled while it grew
        assert status(workload.pid, "THP_enabled") == "1"


@pytest.mark.requires("thp")
def test_answers_are_the_same_after_a_collapse(workload: Workload) -> None:
    content, speed, anonymous = workload.verify(), workload.measure(0.1), smaps(workload.pid, "Anonymous")
    assert content.intact
    assert content.rows > 4000
    assert workload.collapse_itself() > 0
    assert smaps(workload.pid, "AnonHugePages") > SIZE * 0.8
    assert smaps(workload.pid, "Anonymous") > anonymous
    assert workload.verify() == content
    assert workload.measure(0.1).checksum == speed.checksum


def test_it_serves_until_it_is_told_to_stop_whatever_happens_meanwhile(workload: Workload) -> None:
    with workload.serving() as waits:
        pass
    [served] = waits
    assert 0 <= served.p50 <= served.p99
    with pytest.raises(ZeroDivisionError), workload.serving():
        raise ZeroDivisionError
    assert workload.verify().intact
    with workload.serving() as waits:
        workload.close()
    assert waits == []


def test_progress_goes_up_through_the_phases() -> None:
    calls: list[tuple[int, int, str]] = []
    with Workload() as workload:
        workload.start(SIZE, lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert {total for _, total, _ in calls} == {SIZE}
    assert list(dict.fromkeys(phase for _, _, phase in calls)) == ["growing", "changing", "trimming"]
    assert done[-1] == SIZE


def test_ctrl_c_is_left_to_the_parent(workload: Workload) -> None:
    os.kill(workload.pid, signal.SIGINT)
    assert workload.measure(0.0).lookups > 0


def test_second_start_is_refused(workload: Workload) -> None:
    with pytest.raises(UsageError, match=str(workload.pid)):
        workload.start(SIZE)


def test_killed_in_between(workload: Workload) -> None:
    os.kill(workload.pid, signal.SIGKILL)
    with pytest.raises(TargetVanishedError, match="Killed"):
        workload.verify()


def test_close_ends_a_stopped_process_and_may_be_repeated(workload: Workload) -> None:
    pid = workload.pid
    os.kill(pid, signal.SIGSTOP)
    workload.close()
    workload.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_stays_when_the_start_is_interrupted(error: type[BaseException]) -> None:
    pids: list[int] = []
    workload = Workload()

    def interrupt(done: int, total: int, phase: str) -> None:
        pids.append(workload.pid)
        raise error

    progress: StepProgress = interrupt
    with pytest.raises(error):
        workload.start(SIZE, progress)
    assert len(pids) == 1
    assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.parametrize("when", ["growing", "ready"])
def test_nothing_stays_when_the_parent_is_killed(when: str) -> None:
    program = (
        "import sys, time\n"
        "from mthp.demo.client import Workload\n"
        "workload = Workload()\n"
        "show = lambda *_: print(workload.pid, flush=True)\n"
        f"workload.start({SIZE if when == 'ready' else SIZE * 4}, show if {when == 'growing'} else None)\n"
        "show()\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    assert ends(child)


def test_end_of_stdin_ends_it() -> None:
    command = [sys.executable, "-m", "mthp.demo.workload", "--size", str(SIZE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == 0
