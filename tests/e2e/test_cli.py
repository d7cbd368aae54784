"""The command line end to end: the output of each command on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import MTHP, MTHP_AS_NOBODY, TESTS, Actor, memory_of, mthp, mthp_here, mthp_json
from mthp import __version__
from mthp.cli import COMMANDS
from targets import PAGE_SIZE, PMD_SIZE
from thp_switches import ThpSwitches

thp = pytest.mark.requires("root", "thp", "4k-pages", "pagemap_scan")

PAGES = PMD_SIZE // PAGE_SIZE


def test_help_names_every_command_and_the_exit_codes() -> None:
    done = mthp("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)
    assert "4 the target vanished" in " ".join(done.stdout.split())


def test_version() -> None:
    assert mthp("--version").stdout == f"mthp, version {__version__}\n"


@pytest.mark.parametrize("command", ["inspect", "plan", "collapse", "snapshot"])
def test_help_of_a_command(command: str) -> None:
    done = mthp_here(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: mthp {command} ")
    assert "--json" in done.stdout


def test_help_comes_at_once_for_it_imports_nothing_heavy() -> None:
    """The promise is 200 ms, of which the interpreter and click take most."""
    code = "import sys; from mthp.cli import main; main(['--help']); print(*sys.modules)"
    loaded = {*printed_by(code).splitlines()[-1].split()}
    assert not loaded & {"numpy", "rich", "pyarrow", "importlib.metadata", "asyncio", "mthp.linux", "mthp.sim"}
    # As few of its own, and of the library, as the list of commands takes.
    assert len(loaded) < len(printed_by("import sys, click; print(*sys.modules)").split()) + 60


def printed_by(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--all"], ["plan"], ["collapse", "--dry-run"]])
def test_a_pipe_gets_plain_text(actor: Actor, arguments: list[str]) -> None:
    done = mthp(arguments[0], actor.pid, *arguments[1:], env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert str(actor.pid) in done.stdout


@pytest.mark.parametrize("arguments", [["inspect"], ["plan"], ["collapse", "--dry-run"]])
def test_json_is_all_that_is_printed(actor: Actor, arguments: list[str]) -> None:
    done = mthp(*arguments, actor.pid, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert next(iter(answer)) == "schema"
    assert answer["schema"] == f"mthp.{arguments[0]}/1"
    assert done.stdout.startswith("{")
    assert done.stdout.endswith("}\n")


def test_inspect_lists_every_mapping(actor: Actor) -> None:
    census = mthp_json("inspect", actor.pid)
    lines = Path(f"/proc/{actor.pid}/maps").read_text().splitlines()
    bounds = [line.split()[0].split("-") for line in lines]
    assert [[int(vma["start"], 16), int(vma["end"], 16)] for vma in census["vmas"]] == [
        [int(bound, 16) for bound in pair] for pair in bounds
    ]
    assert census["total"]["resident_bytes"] == sum(vma["resident_bytes"] for vma in census["vmas"])
    done = mthp("inspect", actor.pid, "--all")
    assert all(f"{int(start, 16):x}-{int(end, 16):x}" in done.stdout for start, end in bounds)


@thp
def test_the_story_of_a_process(actor: Actor, thp_switches: ThpSwitches, tmp_path: Path) -> None:
    """Inspect, record, plan on both, collapse, inspect."""
    pytest.importorskip("pyarrow")
    thp_switches.set("enabled", "madvise")
    address = actor.map(6 * PMD_SIZE)
    actor.fill(address, 4 * PAGES)
    actor.fill(address + 4 * PMD_SIZE, 100)
    file = tmp_path / "actor.parquet"
    recorded = mthp_json("snapshot", actor.pid, "-o", file)
    assert recorded["path"] == str(file)
    assert recorded["bytes"] == file.stat().st_size
    assert recorded["target"].startswith(f"{actor.pid} (")
    options = ["--policy", "rfc", "--orders", "64K,2M", "--max-ptes-none", 255]
    live, replayed = mthp_json("plan", actor.pid, *options), mthp_json("plan", file, *options)
    # The budget is a share of the resident memory, which the kernel counts with a delay.
    allowed = [answer.pop("by_default") for answer in (live, replayed)]
    assert allowed[0]["folios_by_order"] == allowed[1]["folios_by_order"]
    assert replayed == live
    assert live["folios_by_order"]["9"] >= 4
    assert live["policy"] == "rfc"
    assert (live["orders"], live["max_ptes_none"]) == ([4, 9], 255)
    before = mthp_json("inspect", file)
    # The processes that map a library change all the time.
    assert anonymous(mthp_json("inspect", actor.pid, "--numa")) == anonymous(before)
    report = mthp_json("collapse", actor.pid, "--orders", "2M", "--max-ptes-none", 0)
    assert report["collapsed_ranges"] >= 4
    after = mthp_json("inspect", actor.pid)
    grown = after["total"]["pages_by_state"]["pmd_mapped"] - before["total"]["pages_by_state"]["pmd_mapped"]
    assert grown * PAGE_SIZE == report["collapsed_bytes"]
    assert actor.damaged(address, 4 * PAGES) == 0
    assert before["total"]["zero_filled_pages_by_order"] is None
    zeroes = mthp_json("inspect", actor.pid, "--zero-filled")["total"]["zero_filled_pages_by_order"]
    assert all(0 < pages <= after["total"]["pages_by_order"].get(order, 0) for order, pages in zeroes.items())
    assert "zero-filled" in mthp("inspect", actor.pid, "--zero-filled").stdout
    refused = mthp("inspect", file, "--zero-filled")
    assert (refused.returncode, "has no contents" in refused.stderr) == (3, True)
    text = mthp("snapshot", actor.pid, "-o", file, "--force")
    assert text.stdout.startswith(f"{file}: {actor.pid} (")


def anonymous(census: dict[str, Any]) -> list[dict[str, Any]]:
    return [vma for vma in census["vmas"] if vma["kind"] == "anon"]


# Names that act on a terminal.


EVIL = "evil\x1b[31m\x07\n\x9b2Jx"
MAPS_A_FILE = """
import mmap, sys
open("/proc/self/comm", "w").write("evil\\x1b[31m\\x07")
with open(sys.argv[1], "rb") as file:
    memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
memory[0]
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("on_terminal", [False, True])
def test_names_do_not_act_on_the_terminal(tmp_path: Path, on_terminal: bool) -> None:
    file = tmp_path / EVIL
    file.write_bytes(b"x" * 8192)
    command = [sys.executable, "-c", MAPS_A_FILE, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as target:
        assert target.stdout is not None
        assert target.stdin is not None
        target.stdout.readline()
        try:
            for arguments in (["inspect", str(target.pid), "--all"], ["plan", str(target.pid)]):
                text = on_a_terminal(arguments) if on_terminal else mthp(*arguments).stdout
                assert "evil�[31m" in text
                harmless = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text) if on_terminal else text
                assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]", harmless)
                assert "\x1b[31m" not in text
            census = mthp_json("inspect", target.pid)
            assert str(file) in [vma["name"] for vma in census["vmas"]]
            assert census["target"] == f"{target.pid} (evil\x1b[31m\x07)"
        finally:
            target.stdin.close()


def on_a_terminal(arguments: list[str]) -> str:
    """Return the output on a terminal of 300 columns."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, True)
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "300"}
    with subprocess.Popen([*MTHP, *arguments], stdout=theirs, stderr=theirs, env=environment) as running:
        os.close(theirs)
        got = b""
        try:
            while part := os.read(ours, 65536):
                got += part
        except OSError:
            # The other side is closed (EIO).
            pass
        assert running.wait() == 0
    os.close(ours)
    return got.decode()


# Without rights.


@pytest.fixture
def nobodys() -> Iterator[Actor]:
    """A process of a user without rights."""
    with Actor(as_nobody=True) as actor:
        yield actor


@pytest.mark.slow
@thp
def test_without_rights_an_own_process_can_be_seen(nobodys: Actor, thp_switches: ThpSwitches) -> None:
    thp_switches.set("enabled", "madvise")
    address = nobodys.map(2 * PMD_SIZE)
    nobodys.fill(address, 600)
    census = mthp_json("inspect", nobodys.pid, program=MTHP_AS_NOBODY)
    assert any("CAP_SYS_ADMIN" in missing for missing in census["missing"])
    (vma,) = [vma for vma in census["vmas"] if vma["start"] == hex(address)]
    assert (vma["pages_of_unknown_order"], vma["pages_by_order"]) == (600, {})
    assert "CAP_SYS_ADMIN" in mthp("inspect", nobodys.pid, program=MTHP_AS_NOBODY).stdout
    plan = mthp_json("plan", nobodys.pid, "--max-ptes-none", PAGES - 1, program=MTHP_AS_NOBODY)
    assert plan["folios_by_order"]["9"] >= 2
    assert any("CAP_SYS_ADMIN" in missing for missing in plan["missing"])


@pytest.mark.slow
@thp
def test_without_rights_an_own_process_cannot_be_collapsed(nobodys: Actor, thp_switches: ThpSwitches) -> None:
    thp_switches.set("enabled", "madvise")
    address = nobodys.map(2 * PMD_SIZE)
    nobodys.fill(address, 600)
    before = memory_of(nobodys.pid)
    done = mthp("collapse", nobodys.pid, program=MTHP_AS_NOBODY)
    assert (done.returncode, done.stdout) == (3, "")
    assert "CAP_SYS_NICE" in done.stderr
    assert memory_of(nobodys.pid) == before
    answer = mthp_json("collapse", nobodys.pid, code=3, program=MTHP_AS_NOBODY)
    assert "CAP_SYS_NICE" in answer["error"]["help"]


@pytest.mark.slow
@pytest.mark.requires("root")
@pytest.mark.parametrize("command", ["inspect", "plan", "collapse"])
def test_without_rights_other_processes_cannot_be_seen(actor: Actor, command: str) -> None:
    done = mthp(command, actor.pid, program=MTHP_AS_NOBODY)
    assert (done.returncode, done.stdout) == (3, "")
    assert "CAP_SYS_PTRACE" in done.stderr
    assert str(actor.pid) in done.stderr


COLLAPSE_BUFFER = f"""
import mmap, sys
sys.path.insert(0, {TESTS!r})
import numpy as np
import mthp
from e2e.helpers import become_nobody
from early_imports import import_all
import_all()
become_nobody()
array = np.frombuffer(mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
array[:] = 1
report = mthp.collapse_buffer(array)
print(report.ranges.made, report.complete)
"""


@thp
def test_without_rights_a_process_collapses_itself(thp_switches: ThpSwitches) -> None:
    thp_switches.set("enabled", "madvise")
    done = subprocess.run([sys.executable, "-c", COLLAPSE_BUFFER], capture_output=True, text=True, check=True)
    collapsed, complete = done.stdout.split()
    assert int(collapsed) >= 3
    assert complete == "True"
