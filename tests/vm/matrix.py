"""Run mthp on each kernel: `doctor`, the commands on a workload, and the live tests, as a table.

The live tests run as on any machine: tests of an ability that the kernel lacks are skipped with the reason. The
commands run on a target that checks its own contents (`smoke.py`), and the result is read from the guest's page tables.

The variables MTHP_TEST_* of the environment, which make tests longer or shorter, reach the guests.

A guest reports the begin and the end of every test (`telling.py`), so no result is lost if it dies. A guest is ended
when its time is over, or when it has been silent for long; its current test has failed, and a fresh guest runs the
rest. The results are kept in the lab's cache, by kernel.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vm.apt import cache_directory
from vm.guest import Job, Outcome, run
from vm.kernels import Kernel, split_name
from vm.smoke import COMMANDS
from vm.world import project

LIVE = Path(__file__).resolve().parents[1] / "live"

CELL = 32
"""Characters in a cell of the table."""

GUEST_SECONDS = 2400
"""Seconds after which a fresh guest replaces one."""

SILENCE_SECONDS = 900
"""Seconds of silence after which a guest is ended. A test takes less on any machine."""

PATIENCE = 20
"""Factor of every time limit of the tests, because an emulated processor is slow."""

LOST = "the guest was lost in it"

SETUP = f"""mount -t debugfs debugfs /sys/kernel/debug 2> /dev/null
cd /mthp; export PYTHONPATH=/mthp/tests PYTHONUNBUFFERED=1 TERM=dumb COLUMNS=140
export MTHP_TEST_PROGRAMS=/programs MTHP_TEST_PATIENCE={PATIENCE}
export MTHP_TEST_ROUNDS=1 MTHP_TEST_STRIDE=32 MTHP_TEST_KILLS=22 MTHP_TEST_TURNS=8 MTHP_TEST_TARGETS=6
"""
"""First lines of a script that uses the project in a guest."""

_SMOKE = "python3 -m vm.smoke; smoke=$?\n"
_TESTS = "python3 -m pytest -q -p no:cacheprovider -p vm.telling --continue-on-collection-errors --tb=short {files}\n"

Say = Callable[[str], None]
Boot = Callable[..., Outcome]


@dataclass
class Test:
    """The result of one test.

    Attributes:
        outcome: ``passed``, ``failed`` or ``skipped``; ``began`` until then.
        seconds: its duration.
        why: the reason of the skip, or the failure.
        said: its output.
        tree: the state of mthp and of the files that the test uses, see `tree`.
    """

    outcome: str = "began"
    seconds: float = 0
    why: str = ""
    said: str = ""
    tree: str = ""


@dataclass
class Row:
    """The results of a kernel.

    Attributes:
        name, release: as in `Kernel`.
        smoke: the results of the commands: a word of `smoke.py`'s report, by command.
        tests: by name.
        seconds: the time of all guests together.
        console: the end of the output of the last guest.
    """

    name: str
    release: str
    smoke: dict[str, str] = field(default_factory=dict)
    tests: dict[str, Test] = field(default_factory=dict)
    seconds: float = 0
    console: str = ""

    @property
    def failures(self) -> list[str]:
        """Return the failures, and why."""
        lines = [f"mthp {command}: {said}" for command, said in self.smoke.items() if said.startswith("FAILED")]
        lines += [f"{name}: {test.why}" for name, test in self.tests.items() if test.outcome in ("failed", "began")]
        return lines if self.smoke or self.tests else [f"nothing came of it:\n{self.console}"]

    def file(self, name: str) -> dict[str, Test]:
        """Return the tests of a file."""
        return {nodeid: test for nodeid, test in self.tests.items() if _file_of(nodeid) == name}

    def save(self) -> None:
        """Write it to the cache, for `saved`."""
        path = _place(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1))
        part.rename(path)


def saved(name: str) -> Row | None:
    """Return the kept results of a kernel."""
    if not _place(name).exists():
        return None
    row = Row(**json.loads(_place(name).read_text()))
    row.tests = {name: Test(**test) for name, test in row.tests.items()}  # type: ignore[arg-type]
    return row


def _place(name: str) -> Path:
    return cache_directory() / "results" / f"{name}.json"


def _file_of(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).name


@functools.cache
def tree(test_file: str) -> str:
    """Return a hash of mthp and of the files that a file of live tests uses: all but the kernel lab and other tests."""
    files = hashlib.sha256()
    for name, digest in _digests():
        if not Path(name).name.startswith("test_") or Path(name).name == test_file:
            files.update(name.encode() + b"\0" + digest)
    return files.hexdigest()[:12]


@functools.cache
def _digests() -> list[tuple[str, bytes]]:
    files = sorted(project().items())
    return [(name, hashlib.sha256(data).digest()) for name, data in files if not name.startswith("tests/vm/")]


def live_files(chosen: tuple[str, ...] = ()) -> list[str]:
    """Return the files of the live tests, or those with one of the words `chosen` in their names."""
    names = sorted(path.name for path in LIVE.glob("test_*.py"))
    return [name for name in names if not chosen or any(word in name for word in chosen)]


def examine(
    kernel: Kernel,
    files: list[str],
    *,
    smoke: bool = True,
    row: Row | None = None,
    seconds: float = GUEST_SECONDS,
    echo: bool = False,
    keep: bool = False,
    say: Say = lambda _: None,
    boot: Boot = run,
) -> Row:
    """Run the commands and the live tests `files` on a kernel, in as many guests as needed.

    Args:
        kernel: the kernel.
        files: of `live_files`.
        smoke: whether to run the commands, too.
        row: kept results; tests in it are not run.
        seconds: the time limit of each guest.
        echo: whether to print the output of the guests, and every test.
        keep: whether to save the row after every test.
        say: called with every failed test and every finished file.
        boot: runs a job in a guest.
    """
    row = row or Row(kernel.name, kernel.release)
    while smoke or files:
        known = len(row.tests)
        outcome = _guest(kernel, files, smoke, row, seconds, echo, keep, say, boot)
        row.seconds += outcome.seconds
        row.console = outcome.console[-4000:]
        if lost := [name for name, test in row.tests.items() if test.outcome == "began"]:
            why = f"{LOST}:\n{row.console}"
            row.tests[lost[-1]] = Test("failed", why=why, tree=tree(_file_of(lost[-1])))
            say(f"{kernel.name}: {lost[-1]}: {LOST}")
        if smoke:
            row.smoke = dict.fromkeys(COMMANDS, "FAILED: " + LOST) | row.smoke
        if keep:
            row.save()
        if (outcome.exit_code is not None and not lost) or (len(row.tests) == known and not smoke):
            break  # it finished, or began no test
        smoke = False
    return row


def _guest(
    kernel: Kernel,
    files: list[str],
    smoke: bool,
    row: Row,
    seconds: float,
    echo: bool,
    keep: bool,
    say: Say,
    boot: Boot,
) -> Outcome:
    script = SETUP + _wishes() + (_SMOKE if smoke else "smoke=0\n")
    if files:
        script += _TESTS.format(files=" ".join(f"tests/live/{name}" for name in files))
    done = "\n".join(row.tests).encode()
    job = Job(
        script + "exit $smoke",
        files={"done": done},
        with_python=True,
        seconds=seconds,
        memory_mb=2048 if kernel.platform.name == "x86-64" else 4096,
        silence=SILENCE_SECONDS,
    )
    at = ""

    def listen(line: str) -> None:
        nonlocal at
        what = json.loads(line)
        if "command" in what:
            row.smoke[what["command"]] = what["said"]
            say(f"{kernel.name}: mthp {what['command']}: {what['said']}")
            return
        name = what.pop("test")
        row.tests[name] = Test(**what, tree=tree(_file_of(name)))
        if echo and what:
            say(f"{what['outcome']} after {what['seconds']:.1f} s: {name}\n{what.get('said', '')}".strip())
        if what.get("outcome") == "failed":
            say(f"{kernel.name}: FAILED {name}\n{what['why']}")
        if keep:
            row.save()
        if at and at != _file_of(name):
            say(f"{kernel.name}: {at}: {_cell(row.file(at))}")
        at = _file_of(name)

    return boot(kernel, job, echo=echo, listen=listen)


def _wishes() -> str:
    """Return shell lines that set the variables of this environment for tests, such as MTHP_TEST_LAYOUTS."""
    wishes = {name: value for name, value in os.environ.items() if name.startswith("MTHP_TEST_")}
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in wishes.items())


def table(rows: list[Row]) -> str:
    """Return the table of kernels and test files, as text."""
    titles = ["", *map(_title, rows)]
    lines = [titles]
    for command in dict.fromkeys(name for row in rows for name in row.smoke):
        lines.append([f"mthp {command}", *(_short(row.smoke.get(command, "-")) for row in rows)])
    for name in sorted({_file_of(nodeid) for row in rows for nodeid in row.tests}):
        lines.append([name, *(_cell(row.file(name)) for row in rows)])
    lines.append(["all live tests", *(_cell(row.tests) for row in rows)])
    lines.append(["seconds", *(f"{row.seconds:.0f}" for row in rows)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return text + ("\n* with some of an earlier state of mthp and its tests" if "*" in text else "")


def skips(rows: list[Row]) -> str:
    """Return the reasons of skips, with their number on each kernel, as text."""
    lines = []
    for row in rows:
        counts: dict[str, int] = {}
        for test in row.tests.values():
            if test.outcome == "skipped":
                counts[test.why] = counts.get(test.why, 0) + 1
        lines += [f"{row.name}: {count} skipped: {why}" for why, count in sorted(counts.items())]
    return "\n".join(lines)


def _title(row: Row) -> str:
    """Return the release without the suffix that all kernels of a platform share: ``6.1.0-50``, ``7.3.4-arm64-16k``."""
    _, dash, platform = row.name.partition("-")
    flavour = split_name(row.name)[1].flavour
    return row.release.removesuffix(f"-{flavour}").partition("+")[0] + dash + platform


def _cell(tests: dict[str, Test]) -> str:
    count = Counter(test.outcome for test in tests.values())
    old = any(test.tree != tree(_file_of(name)) for name, test in tests.items())
    parts = [f"{count['passed']} ok"] if count["passed"] else []
    parts += [f"{failed} FAILED"] if (failed := count["failed"] + count["began"]) else []
    parts += [f"{count['skipped']} skip"] if count["skipped"] else []
    return (", ".join(parts) or "-") + ("*" if old else "")


def _short(text: str) -> str:
    """Return a sentence for a cell; longer text stands below the table."""
    text = " ".join(text.split())
    return text if len(text) <= CELL else "FAILED" if text.startswith("FAILED") else f"{text[: CELL - 3]}..."
