"""Hostile input: values out of every range, and a command with bounded memory."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mthp.errors import MthpError
from waiting import PATIENCE

JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, -1, 0, 1, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, -0.0, 1e308, 1e-308),
        *("", "x", "1", "9" * 400, "\ud800", "\x1b[31m", "never", [], [[]], [[], 1], {}, {"a": [1]}, {"0": "never"}),
    ]
)
"""Values of every kind that JSON has, at and beyond the limits of types."""


def paths(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in `data`."""
    yield at
    if isinstance(data, dict):
        for key, value in data.items():
            yield from paths(value, (*at, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from paths(value, (*at, index))


@st.composite
def altered(draw: st.DrawFn, data: Any) -> Any:
    """`data` with one to three of its values replaced or left out."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(paths(data))))
        junk = copy.deepcopy(draw(JUNK))
        if not place:
            return junk
        holder = data
        for step in place[:-1]:
            holder = holder[step]
        if draw(st.booleans()):
            del holder[place[-1]]
        else:
            holder[place[-1]] = junk
    return data


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few bytes changed, left out, doubled or put in."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(made) - 1, 0)))
        end = min(len(made), at + draw(st.integers(0, 8)))
        made[at:end] = draw(st.binary(max_size=8) | st.just(bytes(made[at:end]) * 2) | st.just(b"\xff" * (end - at)))
    return bytes(made)


def refuses(error: MthpError) -> None:
    """Check that an error is one of the contract: short, with an exit code for bad input."""
    assert error.exit_code in {1, 2}, error
    assert len(error.message) < 2000, error


def limited(*arguments: object, memory: int = 2 << 30, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line with at most `memory` bytes of address space, and check that it prints no traceback."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    done = subprocess.run(
        [sys.executable, "-m", "mthp", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=10 * PATIENCE,
        preexec_fn=limit,
        **options,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "MemoryError" not in done.stderr, done.stderr
    return done


def bomb(path: Path, *arguments: object, **options: Any) -> str:
    """Run the command line on the file `path`, which must be refused with the bound and how to raise it."""
    done = limited(*arguments, **options)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert str(path) in done.stderr
    return done.stderr
