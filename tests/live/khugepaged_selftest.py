"""Fetch, build and run Linux's own test of khugepaged with mTHP, with `mthp daemon` and without.

    python tests/live/khugepaged_selftest.py [ORDER ...]

The test is tools/testing/selftests/mm/khugepaged.c of Linux 7.3, from the Debian source package of that kernel. The
archives are those of the machine's apt, with the suites in which new kernels appear. Only the built program is kept, in
the directory for temporary files.

The test waits for two full scans of the kernel's khugepaged, and then expects everything to be collapsed. If both pass
before its first check, it fails without having waited, which proves nothing about the daemon. Otherwise it waits half a
second at a time, and prints a dot for each. So it is tried several times, and failures without a dot do not count.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VERSION = "7.3"
SUITES = ("experimental", "unstable", "testing")
DIRECTORY = Path(tempfile.gettempdir()) / f"mthp-khugepaged-selftest-{os.getuid()}"
BINARY = DIRECTORY / "khugepaged"
TRIES, MOST_TRIES = 3, 20
"""How often the test is tried, and how often with those that fail without a wait."""


def daemon_options(mechanism: str = "move") -> tuple[str, ...]:
    """Return the daemon's options: it does nothing but the test's program, and folios for single pages are bloat."""
    return ("--comm", "khugepaged", "--cpu", "100%", "--mechanism", mechanism, "--max-bloat", "none")


PARTS = 4
"""Parts of the test about mTHP."""

RUN_SECONDS = 180 * float(os.environ.get("MTHP_TEST_PATIENCE", "1"))

_WANTED = (
    "tools/testing/selftests/mm/*",
    "tools/testing/selftests/*.h",
    "tools/include/*",
    "tools/arch/*/include/*",
    "arch/*/include/uapi/*",
)
_SOURCES = ("khugepaged.c", "vm_util.c", "hugepage_settings.c")


class UnobtainableError(Exception):
    """The test cannot be had here; the text says why."""


@dataclass(frozen=True)
class Outcome:
    """The output of one run of the test.

    Attributes:
        passed, failed: names of its parts.
        text: all of it.
    """

    passed: tuple[str, ...]
    failed: tuple[str, ...]
    text: str

    @property
    def hasty(self) -> bool:
        """Return whether a part failed without having waited."""
        return re.search(r"[^.]\.\.\. ?(\x1b\[\d+m)?Fail", self.text) is not None


def build() -> Path:
    """Return the test's program, fetched and built if it is not there yet.

    Raises:
        UnobtainableError: it cannot be fetched, or not be built.
    """
    try:
        if not BINARY.exists():
            DIRECTORY.mkdir(exist_ok=True, mode=0o700)
            _unpack(_fetch())
            _compile()
    except OSError as error:
        raise UnobtainableError(f"{DIRECTORY}: {error}") from error
    return BINARY


def run(*arguments: str) -> Outcome:
    """Run the test. One that does not end in time has failed as a whole."""
    try:
        done = subprocess.run(
            [build(), *arguments], capture_output=True, timeout=RUN_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        return Outcome((), (f"ending within {RUN_SECONDS} s",), str(error.stdout))
    text = done.stdout.decode(errors="replace")
    parts = re.findall(r"^(not )?ok \d+ (.*)$", text, re.MULTILINE)
    return Outcome(
        tuple(name for no, name in parts if not no), tuple(name for no, name in parts if no), text + str(done.stderr)
    )


def _fetch() -> Path:
    """Return the source package."""
    package = f"linux-source-{VERSION}"
    archives = _archives()
    if not archives:
        raise UnobtainableError("apt knows no archive here")
    entries = [
        f"Types: deb\nURIs: {site}\nSuites: {suite}\nComponents: main\n" for site in archives for suite in SUITES
    ]
    sources = DIRECTORY / "archives.sources"
    sources.write_text("\n".join(entries))
    (DIRECTORY / "lists").mkdir(exist_ok=True)
    (DIRECTORY / "cache").mkdir(exist_ok=True)
    options = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": DIRECTORY / "lists",
        "Dir::Cache": DIRECTORY / "cache",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    # Some archives lack some suites; what counts is whether the package is found afterwards.
    _call([*apt, "update"], may_fail=True)
    _call([*apt, "download", package])
    found = sorted(DIRECTORY.glob(f"{package}_*.deb"))
    if not found:
        raise UnobtainableError(f"apt has no {package}")
    return found[-1]


def _archives() -> list[str]:
    """Return the addresses of the archives of Debian that apt is set up for here."""
    try:
        lines = _call(["apt-get", "indextargets", "--format", "$(SITE)|$(LABEL)", "Created-By: Packages"]).splitlines()
    except UnobtainableError:
        return []
    return sorted({site for site, _, label in (line.partition("|") for line in lines) if label == "Debian"})


def _unpack(package: Path) -> None:
    """Take the test and the headers that it needs out of the package, and throw the rest away."""
    top = f"linux-source-{VERSION}"
    inner = f"./usr/src/{top}.tar.xz"
    wanted = " ".join(f"'{top}/{pattern}'" for pattern in _WANTED)
    _call(
        [
            "bash",
            "-c",
            f"set -o pipefail; dpkg-deb --fsys-tarfile '{package}' | tar -xO '{inner}' | tar -xJ --wildcards {wanted}",
        ]
    )
    package.unlink()


def _compile() -> None:
    tree = DIRECTORY / f"linux-source-{VERSION}"
    tests = tree / "tools/testing/selftests/mm"
    includes = ["-I", str(tests.parent), "-isystem", str(tree / "tools/include/uapi")]
    _call(["cc", "-O2", "-w", *includes, *(str(tests / name) for name in _SOURCES), "-o", str(BINARY), "-lpthread"])


def _call(command: list[str], *, may_fail: bool = False) -> str:
    try:
        done = subprocess.run(command, cwd=DIRECTORY, capture_output=True, text=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnobtainableError(f"{command[0]}: {error}") from error
    if done.returncode and not may_fail:
        raise UnobtainableError(f"{' '.join(command[:2])}: {done.stderr.strip()[-400:]}")
    return done.stdout


def _main(orders: list[str]) -> int:
    from daemons import RunningDaemon

    bad = 0
    before = run("khugepaged:anon")
    print("khugepaged:anon without the daemon:", told(before))
    with (
        tempfile.TemporaryDirectory() as directory,
        RunningDaemon(Path(directory) / "run", *daemon_options()),
    ):
        for order in orders:
            bad += not passes(order)
        after = run("khugepaged:anon")
    print("khugepaged:anon with the daemon:", told(after))
    for order in orders:
        outcome = run("-c", order, "mthp_khugepaged:anon")
        print(f"order {order} without the daemon:", told(outcome))
        bad += "collapse_full" not in outcome.failed
    return 1 if bad or len(after.passed) < len(before.passed) else 0


def tries(order: str) -> Iterator[Outcome]:
    """Run the part about mTHP until all of it passes, or the tries are used up."""
    waited = 0
    for _ in range(MOST_TRIES):
        outcome = run("-c", order, "mthp_khugepaged:anon")
        yield outcome
        waited += not outcome.hasty
        if len(outcome.passed) == PARTS or waited == TRIES:
            break


def passes(order: str) -> bool:
    """Return whether the part about mTHP passes in one of the tries, and print each."""
    for attempt, outcome in enumerate(tries(order), 1):
        print(f"order {order} with the daemon, try {attempt}:", told(outcome))
    return len(outcome.passed) == PARTS


def told(outcome: Outcome) -> str:
    """Return an outcome in a line."""
    failed = (", ".join(outcome.failed) or "none") + (" (without a wait)" if outcome.hasty else "")
    return f"{len(outcome.passed)} of {len(outcome.passed) + len(outcome.failed)} passed, failed: {failed}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(_main(sys.argv[1:] or [str(order) for order in range(2, 9)]))
