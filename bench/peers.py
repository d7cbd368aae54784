"""What the benchmarks share: a C peer built on the spot, paired timings, and how a ratio is printed."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

BUILD = Path(__file__).parent / ".build"


def compiled(source: str) -> ctypes.CDLL:
    """Compile ``bench/<source>`` with ``cc -O2`` into a shared library, and load it."""
    BUILD.mkdir(exist_ok=True)
    path = Path(__file__).parent / source
    library = BUILD / path.with_suffix(".so").name
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, path], check=True)
    return ctypes.CDLL(str(library))


class Pair(NamedTuple):
    """Medians over the rounds of one comparison, in seconds; `ratio` is the median of ours / peer, round by round."""

    ours: float
    peer: float
    ratio: float


def paired(ours: Callable[[], object], peer: Callable[[], object], rounds: int = 9) -> Pair:
    """Time two functions in turn, after one round that does not count."""
    pairs = [(_timed(ours), _timed(peer)) for _ in range(rounds + 1)][1:]
    return Pair(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def show(what: str, pair: Pair, aim: float | None = None) -> None:
    """Print one figure: the ratio, what it should be at most, and the two times behind it."""
    verdict = "" if aim is None else f"at most {aim:.3g}: {'ok' if pair.ratio <= aim else 'MISSED'}"
    times = f"{pair.ours * 1e3:8.2f} ms against {pair.peer * 1e3:8.2f} ms"
    print(f"{what:<76} {pair.ratio:7.2f}  {verdict:<22} {times}", flush=True)
