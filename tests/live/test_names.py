"""Targets by name, on real processes, control groups and namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import RunningDaemon
from e2e.helpers import Actor, mthp, mthp_json, unused_pid
from mthp.linux.facts import FactsReader
from targets import PAGE_SIZE
from waiting import until

pytestmark = pytest.mark.live


ID = "3f2a" + "0" * 60
TOP = f"mthp-test-{os.getpid()}.slice"
INNER = f"{TOP}/kubepods-pod0a1b2c3d_1111_2222_3333_445566778899.slice/cri-containerd-{ID}.scope"


def hierarchy() -> Path:
    """Return where version 2 is mounted, or skip."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line and os.geteuid() == 0:
            return Path(line.split()[4])
    pytest.skip("needs root and the cgroup version 2 hierarchy")


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group as a container has one."""
    top = hierarchy()
    directory = top / INNER
    directory.mkdir(parents=True)
    yield directory
    until(lambda: all(map(_removed, (directory, *directory.parents[:2]))), lambda: f"{directory} to be empty")


def _removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


@contextlib.contextmanager
def sleeper(group: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, in a control group."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            if group is not None:
                (group / "cgroup.procs").write_text(str(process.pid))
            yield process
        finally:
            process.kill()


READ = "import sys; from mthp.linux.facts import FactsReader; r = FactsReader(); p = ('cgroup',);\
 print(r.read(int(sys.argv[1]), p).cgroup, r.read(int(sys.argv[2]), p).cgroup, r.hidden(p) or '-')"


@pytest.mark.parametrize("prefix", [(), ("unshare", "--cgroup")])
def test_paths_of_control_groups_are_absolute_in_a_cgroup_namespace(group: Path, prefix: tuple[str, ...]) -> None:
    with sleeper(group) as inside, sleeper() as outside:
        there = FactsReader().read(outside.pid, ("cgroup",))
        assert there is not None
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        command = ["sh", "-c", enter, "sh", *prefix, sys.executable, "-c", READ, str(inside.pid), str(outside.pid)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert said == [f"/{INNER}", there.cgroup, "-"]


def test_rules_on_control_groups_hold_in_a_cgroup_namespace(group: Path, tmp_path: Path) -> None:
    with sleeper(group) as process:
        words = [f"container:{ID[:12]}", "unit:cri-containerd-*", f"cgroup:/{TOP}"]
        for number, word in enumerate(words):
            with RunningDaemon(tmp_path / str(number), word, prefix=("unshare", "--cgroup")) as daemon:
                # Containers of other programs on this machine may fit the pattern, too.
                until(lambda daemon=daemon: process.pid in rules_of(daemon), lambda: "the target")  # type: ignore[misc]
                assert rules_of(daemon)[process.pid] == word


def rules_of(daemon: RunningDaemon) -> dict[int, str]:
    """Return the rule of each target, by PID."""
    return {target["pid"]: target["rule"] for target in daemon.status()["targets"]}


def test_a_namespace_of_processes_of_its_own_says_that_paths_are_cut() -> None:
    hierarchy()
    command = ["unshare", "--cgroup", "--pid", "--fork", "--mount-proc", sys.executable, "-c", READ, "1", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "hostPID" in said


SIZE = 4 << 20


def linked(directory: Path, name: str, program: str) -> str:
    """Return the path of a link to a program, by which its process has another name."""
    link = directory / name
    link.symlink_to(str(shutil.which(program)))
    return str(link)


def test_each_command_takes_several_targets_and_adds_them_up(group: Path, tmp_path: Path) -> None:
    gone = unused_pid()
    with Actor() as one, Actor() as other:
        pids = {one.pid, other.pid}
        for actor in (one, other):
            (group / "cgroup.procs").write_text(str(actor.pid))
            actor.fill(actor.map(SIZE), SIZE // PAGE_SIZE)

        def by_name(command: str, *options: object) -> Any:
            said: Any = mthp_json(command, f"container:{ID[:12]}", gone, *options, code=1)
            *done, failed = said["targets"]
            assert failed["target"] == str(gone)
            assert failed["error"]["exit_code"] == 4
            assert {int(each.get("plan", each)["target"].split()[0]) for each in done} == pids
            return said

        assert by_name("inspect")["anonymous"]["resident_bytes"] >= 2 * SIZE
        assert by_name("plan")["total"]["planned_bytes"] >= 2 * SIZE
        assert by_name("collapse")["total"]["collapsed_bytes"] >= 2 * SIZE
        said = by_name("trim", "--dry-run")
        assert said["total"]["zero_bytes"] == sum(each["plan"]["zero_bytes"] for each in said["targets"][:2])
        by_name("record", "--for", "200ms", "-o", tmp_path / "recordings")
        assert {int(path.name.split("-")[0]) for path in (tmp_path / "recordings").iterdir()} == pids


def test_a_table_has_a_line_for_each_target_and_the_sum(tmp_path: Path) -> None:
    sleep = linked(tmp_path, "mthp-test-two", "sleep")
    with subprocess.Popen([sleep, "600"]) as one, subprocess.Popen([sleep, "600"]) as other:
        try:
            for command in (
                ["inspect"],
                ["plan"],
                ["collapse", "--dry-run"],
                ["trim", "--dry-run"],
                ["verify", "--expect", "2M>=0%"],
            ):
                done = mthp(*command, "mthp-test-two")
                lines = [line.split() for line in done.stdout.splitlines() if line]
                # Title and heads before the rows, remarks behind them.
                rows = [line for line in lines[2:] if line[0] != "note:"]
                assert [line[0] for line in rows] == [*map(str, sorted((one.pid, other.pid))), "in"]
        finally:
            one.kill()
            other.kill()


def test_a_name_that_fits_one_process_shows_it_in_full(tmp_path: Path) -> None:
    with subprocess.Popen([linked(tmp_path, "mthp-test-one", "sleep"), "600"]) as process:
        try:
            assert "Mappings (" in mthp("inspect", "mthp-test-one").stdout
            assert len(mthp_json("inspect", "mthp-test-one")["targets"]) == 1
            # What takes one target takes a name that fits one.
            assert mthp("snapshot", "mthp-test-one", "-o", tmp_path / "file").returncode == 0
        finally:
            process.kill()


def test_the_shell_of_this_mthp_is_left_out_of_what_a_name_finds(tmp_path: Path) -> None:
    shell = linked(tmp_path, "mthp-test-shell", "sh")
    script = f"{sys.executable} -m mthp collapse mthp-test-shell; exit $?"
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is an ancestor of this mthp" in done.stdout
