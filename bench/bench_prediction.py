"""Compare the prediction of `mthp compare` for real programs with the outcome of `mthp collapse`, and measure speed.

Each program (:mod:`programs`) is started again for every setting, loaded, and measured. Then the command line runs
``mthp record``, ``compare`` of the recording, ``collapse`` of the process, and ``report``. Predicted are the share of
the memory that PMD entries map, and the memory added (bloat). The measured values are AnonHugePages and Anonymous in
smaps_rollup, before and after. smaps does not show folios below the PMD size, so the share of memory in large folios of
any size comes from kpageflags. Throughput, p99 and processor time for each operation are medians of several runs before
and after, with lowest and highest; other work on the machine changes the last one least.

    python bench/bench_prediction.py [--programs redis,postgres,jvm,sqlite] [--runs 5] [--keep DIRECTORY]

Programs that are not installed are left out, with a message. Debian's packages are redis, postgresql (with its user
postgres), and default-jdk-headless.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programs import PROGRAMS, Memory, Speed, lacking, memory_of

BOUNDS = ("--mechanism", "madvise,move", "--max-bloat", "none")
"""No limit, because the prediction is of the whole plan."""

POINTS_AIM = 2.0
"""Percentage points by which a prediction may differ."""

SETTINGS: tuple[tuple[str, str, list[str], list[str]], ...] = (
    ("mainline, 2M, 511", "mainline", ["--orders", "2M", "--max-ptes-none", "511"], []),
    ("mainline, 2M, 64", "mainline", ["--orders", "2M", "--max-ptes-none", "64"], []),
    ("mainline, all sizes, 0", "mainline", ["--max-ptes-none", "0"], ["--max-pause", "20ms"]),
    ("no-creep, all sizes, 64", "no-creep", ["--max-ptes-none", "64"], ["--max-pause", "20ms", "--fill"]),
)
"""Settings: a name, the policy, options of both commands, and further options of collapse."""


def mthp(*arguments: object) -> dict[str, Any]:
    """Run a command of mthp and return its JSON. A partial collapse is accepted."""
    command = [sys.executable, "-m", "mthp", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@dataclass(frozen=True)
class Result:
    """Predicted and measured, for one program and setting; shares of 1, and bytes.

    Attributes:
        coverage, large, bloat: predicted and measured.
        memory: before and after.
        before, after: speeds.
        left: what collapse could not do, and why.
    """

    program: str
    setting: str
    coverage: tuple[float, float]
    large: tuple[float, float]
    bloat: tuple[float, float]
    memory: tuple[Memory, Memory]
    before: list[Speed]
    after: list[Speed]
    left: str

    @property
    def worst(self) -> float:
        """Return the largest error, in percentage points."""
        return 100 * max(abs(predicted - measured) for predicted, measured in (self.coverage, self.large, self.bloat))


def tried(
    name: str, setting: str, policy: str, options: list[str], more: list[str], runs: int, directory: Path
) -> Result:
    """Predict, collapse and measure one program under one setting."""
    with PROGRAMS[name](directory) as running:
        running.measure()
        before = [running.measure() for _ in range(runs)]
        recording = directory / f"{name}.recording"
        mthp("record", running.pid, "-o", recording, "--force", "--every", "500ms", "--for", "1200ms", "--cpu", "100%")
        [_, predicted] = mthp("compare", recording, "--policies", policy, *options)["rows"]
        was = memory_of(running.pid)
        report = mthp("collapse", running.pid, "--policy", policy, *BOUNDS, *options, *more)
        now = memory_of(running.pid)
        large = mthp("compare", running.pid, "--policies", "pmd-only", "--orders", "2M")["rows"][0]["large_coverage"]
        mthp("report", recording, "-o", directory / f"{name}.html", "--force")
        after = [running.measure() for _ in range(runs)]
    huge = predicted["huge_coverage"] * predicted["resident_bytes"]
    return Result(
        name,
        setting,
        # compare speaks of the PMD ranges that may be collapsed, smaps of all anonymous memory.
        coverage=(huge / (was.anonymous + predicted["bloat_bytes"]), now.coverage),
        large=(predicted["large_coverage"], large),
        bloat=(predicted["bloat_bytes"] / was.anonymous, (now.anonymous - was.anonymous) / was.anonymous),
        memory=(was, now),
        before=before,
        after=after,
        left=left(report),
    )


def left(report: dict[str, Any]) -> str:
    """What a collapse did not do, and why."""
    reasons = {size: tally["reasons"] for size, tally in report["folios"].items() if tally["reasons"]}
    said = {"ranges": report["failed_ranges"], "folios": reasons, "error": report["error"]}
    return json.dumps({key: value for key, value in said.items() if value})


def spread(values: Sequence[float], factor: float = 1.0) -> str:
    """Median, lowest and highest."""
    scaled = [value * factor for value in values]
    median, low, high = (
        f"{each:,.0f}" if each >= 1000 else f"{each:.4g}"
        for each in (statistics.median(scaled), min(scaled), max(scaled))
    )
    return f"{median} ({low} to {high})"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as Markdown has it."""
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def show(results: Sequence[Result]) -> None:
    """Print what was predicted and measured, and what it was worth."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    print(f"Linux {platform.release()}, {platform.machine()}, {os.cpu_count()} processors, {memory} GiB\n")
    table(
        ("program", "setting", "mapped as 2M: predicted, measured", "in large folios", "bloat", "largest error"),
        [
            (
                each.program,
                each.setting,
                *(f"{predicted:.2%}, {got:.2%}" for predicted, got in (each.coverage, each.large, each.bloat)),
                f"{each.worst:.2f} points{'' if each.worst <= POINTS_AIM else ': MISSED'}",
            )
            for each in results
        ],
    )
    table(
        (
            "program",
            "setting",
            "RSS MiB",
            "operations/s before",
            "after",
            "ratio",
            "p99 µs before",
            "after",
            *COST_HEADS,
        ),
        [
            (
                each.program,
                each.setting,
                " to ".join(str(memory.rss >> 20) for memory in each.memory),
                spread([one.rate for one in each.before]),
                spread([one.rate for one in each.after]),
                _ratio([one.rate for one in each.after], [one.rate for one in each.before]),
                *(spread([one.p99 for one in side], 1e6) for side in (each.before, each.after)),
                *(spread([one.cost for one in side], 1e6) for side in (each.before, each.after)),
                _ratio([one.cost for one in each.after], [one.cost for one in each.before]),
            )
            for each in results
        ],
    )


COST_HEADS = ("processor µs/operation before", "after", "ratio")


def _ratio(after: Sequence[float], before: Sequence[float]) -> str:
    """Of the medians."""
    return f"{statistics.median(after) / statistics.median(before):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="which, separated by commas")
    parser.add_argument("--runs", type=int, default=5, help="measurements of speed before and after")
    parser.add_argument("--keep", type=Path, help="a directory that recordings and reports stay in")
    options = parser.parse_args()
    # An interrupted run still prints what it has measured.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(exist_ok=True)
        stack.callback(lambda: show(results))
        for name in options.programs.split(","):
            if missing := lacking(name):
                print(f"{name} is left out: {missing} is not installed", file=sys.stderr)
                continue
            for setting, policy, arguments, more in SETTINGS:
                results.append(tried(name, setting, policy, arguments, more, options.runs, place))
                worst, rest = results[-1].worst, results[-1].left
                print(f"{name}, {setting}: {worst:.2f} points; {rest}", file=sys.stderr, flush=True)
    sys.exit(any(result.worst > POINTS_AIM for result in results))


if __name__ == "__main__":
    main()
