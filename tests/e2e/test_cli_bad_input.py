"""Bad input on the command line: a message that helps, the right exit code, no traceback, and nothing changed.

Most cases run :func:`mthp.cli.main` in this process, where an exception that is not caught fails the test; those
that are about processes, pipes and signals run the real command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from e2e.helpers import MTHP, Actor, ancestors, mthp, unused_pid
from fakes import FakeSpace, page_runs
from mthp.cli import COMMANDS, main
from mthp.ptes import Pte
from mthp.vma import Vma
from targets import PMD_SIZE

BASE = 1 << 40
TARGETED = ("inspect", "plan", "collapse", "compare")
WRITING = ("snapshot", "record", "report")
"""Those that want a file to write, too."""


class Said(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Said:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    pytest.importorskip("pyarrow")
    from mthp.snapshot import record

    path = tmp_path / "fake.parquet"
    record(FakeSpace([(Vma(BASE, BASE + PMD_SIZE, "rw-p"), *page_runs((512, Pte.PRESENT, 0)))]), path)
    return path


def refused(said: Said, code: int, *words: str) -> None:
    """Check that `said` is an error with this code and all of `words`, and that standard output is empty."""
    assert said.code == code, said
    assert said.out == ""
    for word in words:
        assert word in said.err, said.err


# Targets.


@pytest.mark.parametrize("command", [*TARGETED, *WRITING])
@pytest.mark.parametrize("pid", [None, "0", "99999999", "9" * 5000], ids=["unused", "0", "too large", "long"])
def test_no_process_of_that_number(run: Run, tmp_path: Path, command: str, pid: str | None) -> None:
    pid = pid or str(unused_pid())
    output = tmp_path / "out"
    refused(run(command, pid, *(["-o", output] if command in WRITING else [])), 4, f"no process {pid[:8]}")
    assert not output.exists()


@pytest.mark.parametrize("command", TARGETED)
def test_negative_numbers(run: Run, command: str) -> None:
    refused(run(command, "-1"), 2, "-1")
    refused(run(command, "--", "-1"), 4, "no process -1")


@pytest.mark.parametrize("command", TARGETED)
def test_a_zombie(run: Run, actor: Actor, command: str) -> None:
    actor.kill_unwaited()
    refused(run(command, actor.pid), 4, "zombie")


@pytest.mark.parametrize("command", TARGETED)
def test_a_kernel_thread(run: Run, command: str) -> None:
    try:
        is_kernels = Path("/proc/2/comm").read_text() == "kthreadd\n"
    except OSError:
        is_kernels = False
    if not is_kernels:
        pytest.skip("no kernel thread is visible in this PID namespace")
    refused(run(command, 2), 3, "kernel thread")


def test_a_thread(run: Run, actor: Actor) -> None:
    tid = actor.tell("start_thread")
    refused(run("plan", tid), 2, f"{tid} is a thread of process {actor.pid}", f"use the PID {actor.pid}")


def test_an_own_ancestor_is_inspected_but_not_collapsed(run: Run) -> None:
    # The first process of a PID namespace has no parent there.
    for pid in ancestors():
        refused(run("collapse", pid), 2, f"process {pid} is an ancestor")
        refused(run("collapse", pid, "--dry-run"), 2, "ancestor")
    # Here this process is the ancestor.
    done = mthp("collapse", os.getpid())
    assert (done.returncode, done.stdout) == (2, "")
    assert f"process {os.getpid()} is an ancestor" in done.stderr
    assert mthp("plan", os.getpid()).returncode == 0


# Files as targets.


@pytest.mark.parametrize("command", TARGETED)
@pytest.mark.parametrize("target", ["no-such-file", "", "a" * 300, "--", "no/such/directory/file"])
def test_a_missing_file(run: Run, command: str, target: str) -> None:
    refused(run(command, "--", target), 2)


def test_a_missing_file_says_what_can_be_given(run: Run) -> None:
    refused(run("inspect", "no-such-file"), 2, "'no-such-file'", "PID", "self", "mthp snapshot")


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_what_is_no_snapshot(run: Run, tmp_path: Path, command: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("PAR2 and more")
    refused(run(command, path), 2, str(path), "not a Parquet file")
    refused(run(command, tmp_path), 2, f"mthp: {tmp_path} is not a regular file")


def test_a_snapshot_cannot_be_collapsed(run: Run, snapshot: Path) -> None:
    refused(run("collapse", snapshot), 3, "is a snapshot", f"mthp plan {snapshot}")
    assert run("collapse", snapshot, "--dry-run").code == 0


# Sizes, limits, policies and other values.


@pytest.mark.parametrize("command", ["plan", "collapse"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--orders", "48K"], ["'48K'", "16K, 32K"]),
        (["--orders", "order=1"], ["order 1 does not exist on x86-64", "16K"]),
        (["--orders", ""], ["no order was given"]),
        (["--max-ptes-none", "512"], ["max_ptes_none 512 is not within 0 to 511"]),
        (["--max-ptes-swap", "512"], ["max_ptes_swap 512"]),
        (["--max-ptes-shared", "100000"], ["max_ptes_shared 100000"]),
        (["--max-ptes-none", "many"], ["--max-ptes-none", "many"]),
        (["--policy", "bold"], ["unknown policy 'bold'", "pmd-only", "rfc", "per-order", "mainline"]),
        (["--mthp-min-order", "1"], ["order 1 does not exist"]),
        (["--orders"], ["--orders"]),
        (["another-target"], ["another-target"]),
    ],
)
def test_values_that_do_not_exist(run: Run, snapshot: Path, command: str, options: list[str], words: list[str]) -> None:
    refused(run(command, snapshot, *options), 2, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--min-coverage", "101%"], ["--min-coverage: '101%' is more than 100%", "20%"]),
        (["--max-bloat", "5"], ["--max-bloat: '5' has no unit", "write 5% for a share", "5B for bytes"]),
        (["--rate", "0"], ["rate of '0'", "not above 0"]),
        (["--rate", "500"], ["--rate: '500' has no unit: it would be 500 bytes", "write 500M"]),
        (["--max-pause", "2"], ["'2' has no unit", "write 2s or 2ms"]),
        (["--pause-share", "1"], ["'1' has no unit", "write 1% or 100%"]),
        (["--mechanism", "magic"], ["'magic'", "auto", "madvise", "move"]),
    ],
)
def test_values_of_a_collapse(run: Run, snapshot: Path, options: list[str], words: list[str]) -> None:
    refused(run("collapse", snapshot, "--dry-run", *options), 2, *words)


@pytest.mark.parametrize("arguments", [["frobnicate"], ["inspect"], ["--bold"], ["snapshot", "self"]])
def test_commands_that_do_not_exist_or_lack_something(run: Run, arguments: list[str]) -> None:
    refused(run(*arguments), 2, "Usage: mthp")


# Standard output.


@pytest.mark.parametrize("arguments", [["inspect", "self", "--all"], ["inspect", "self", "--json"], ["--help"]])
def test_a_pipe_that_is_closed_early(arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "w") as pipe:
        done = mthp(*arguments, stdout=pipe)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_reader_that_has_enough_after_a_line() -> None:
    with subprocess.Popen(
        [*MTHP, "inspect", "self", "--all"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        # The output may have fitted into the pipe.
        assert running.wait() in {0, 1}


@pytest.mark.parametrize("arguments", [["inspect", "self"], ["plan", "self", "--json"], ["--version"]])
def test_standard_output_that_is_full(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = mthp(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


# Errors as JSON.


@pytest.mark.parametrize(
    ("arguments", "schema", "code", "word"),
    [
        (["inspect", "99999999"], "mthp.inspect/1", 4, "no process 99999999"),
        (["plan", "no-such-file"], "mthp.plan/1", 2, "no-such-file"),
        (["plan"], "mthp.plan/1", 2, "TARGET"),
        (["plan", "self", "--bold"], "mthp.plan/1", 2, "--bold"),
        (["collapse", "self", "--rate", "0"], "mthp.collapse/1", 2, "rate"),
        (["frobnicate"], "mthp/1", 2, "frobnicate"),
    ],
)
def test_with_json_errors_are_an_object_too(run: Run, arguments: list[str], schema: str, code: int, word: str) -> None:
    said = run(*arguments, "--json")
    answer = json.loads(said.out)
    assert list(answer) == ["schema", "error"]
    assert answer["schema"] == schema
    assert answer["error"].keys() == {"message", "help", "exit_code"}
    assert answer["error"]["exit_code"] == said.code == code
    assert word in answer["error"]["message"]
    assert answer["error"]["message"] in said.err
    assert all(line.strip() in said.err for line in answer["error"]["help"].splitlines())


@pytest.mark.parametrize(
    "command", sorted(COMMANDS.keys() - {"doctor", "demo", "status", "pause", "resume", "conformance"})
)
def test_an_unknown_option_is_refused(run: Run, command: str) -> None:
    refused(run(command, "--bold"), 2, "--bold")


EVIL_NAME = "evil\x1b[31m\x07"


def test_control_characters_of_a_process_do_not_reach_the_terminal_in_errors(run: Run) -> None:
    code = f"import sys; open('/proc/self/comm', 'w').write({EVIL_NAME!r}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as target:
        assert target.stdout is not None
        assert target.stdin is not None
        target.stdout.readline()
        target.stdin.close()
        # Ended, and not waited for: a zombie that still has its name.
        os.waitid(os.P_PID, target.pid, os.WEXITED | os.WNOWAIT)
        said = run("inspect", target.pid)
    refused(said, 4, "evil�[31m", "zombie")
    assert "\x1b" not in said.err
    assert "\x07" not in said.err


@pytest.mark.slow
@pytest.mark.parametrize("command", TARGETED)
def test_a_target_that_exits_meanwhile(command: str) -> None:
    for delay in (0.05, 0.12, 0.18, 0.25):
        with Actor() as actor:
            address = actor.map(16 * PMD_SIZE)
            actor.write(address, 8192)
            killer = threading.Timer(delay, actor.kill)
            killer.start()
            done = mthp(command, actor.pid, "--json")
            killer.join()
        assert done.returncode in {0, 1, 3, 4}, done
        answer = json.loads(done.stdout)
        assert done.returncode != 4 or answer.get("vanished") or answer["error"]["exit_code"] == 4


@pytest.mark.parametrize("address", ["zz", "-1", "0x", "1_0", " 7f", "1" * 17, "\u0661", ""])
def test_what_is_no_address(run: Run, address: str) -> None:
    refused(run("explain", "self", "--", address), 2, "is not an address", "in hex")
