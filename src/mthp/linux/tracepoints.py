"""Read tracepoints of the kernel through perf_event_open(2).

tracefs describes the fields of an event in ``events/GROUP/NAME/format``. Fields and the numbers of symbols differ from
release to release, so they are read there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mthp.closing import Closing
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.linux.abi import PERF_RECORD_LOST, PERF_RECORD_SAMPLE, perf_tracepoint

RING_BYTES = 1 << 16
"""Bytes for the records of one event on one processor between two reads: some 700 records."""

_FIELD = re.compile(
    r"\tfield:(?P<declared>[^;]+);\toffset:(?P<offset>\d+);\tsize:(?P<size>\d+);\tsigned:(?P<signed>\d);"
)
_SYMBOLS = re.compile(r"__print_symbolic\(REC->(\w+), (\{.*?\})\)")
_SYMBOL = re.compile(r'\{(-?\w+), "([^"]*)"\}')
_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}

_DATA_HEAD, _DATA_TAIL = 1024, 1032
"""Offsets in ``struct perf_event_mmap_page`` (include/uapi/linux/perf_event.h)."""


@dataclass(frozen=True, slots=True)
class Format:
    """The layout of an event's records.

    Attributes:
        number: its ID in this boot of the machine.
        fields: offset of each number, and its code for :mod:`struct`.
        symbols: the words for the numbers of a field.
    """

    name: str
    number: int
    fields: Mapping[str, tuple[int, str]]
    symbols: Mapping[str, Mapping[int, str]]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a file ``format``.

        Raises:
            ValueError: the text is not such a file.
        """
        name, number = re.search(r"^name: (\S+)$", text, re.M), re.search(r"^ID: (\d+)$", text, re.M)
        if name is None or number is None:
            raise ValueError("a format without a name or an ID")
        fields = {}
        for match in _FIELD.finditer(text):
            code = _CODES.get(int(match["size"]))
            # Arrays (of a fixed or a variable length) are not single numbers.
            if code is not None and "[" not in match["declared"]:
                code = code if match["signed"] == "1" else code.upper()
                fields[match["declared"].split()[-1].lstrip("*")] = int(match["offset"]), code
        symbols = {
            field: {int(number, 0): word for number, word in _SYMBOL.findall(pairs)}
            for field, pairs in _SYMBOLS.findall(text)
        }
        return cls(name[1], int(number[1]), fields, symbols)

    def read(self, data: bytes) -> dict[str, int | str]:
        """Return the values of a record, by field: a word for a number that has one."""
        found: dict[str, int | str] = {}
        for name, (offset, code) in self.fields.items():
            number: int = struct.unpack_from("=" + code, data, offset)[0]
            found[name] = self.symbols.get(name, {}).get(number, number)
        return found


def tracefs(mounts: Path = Path("/proc/self/mounts")) -> Path:
    """Return the mount point of tracefs.

    Raises:
        UnsupportedError: it is not mounted.
    """
    for line in mounts.read_text(errors="surrogateescape").splitlines():
        _, where, kind, *_ = line.split(" ")
        if kind == "tracefs":
            return Path(where.encode("utf-8", "surrogateescape").decode("unicode_escape"))
    raise UnsupportedError(
        "tracefs is not mounted", help="mount it as root: mount -t tracefs nodev /sys/kernel/tracing"
    )


def read_formats(root: Path, group: str, names: Sequence[str]) -> list[Format]:
    """Return the formats of those of `names` that this kernel has.

    Args:
        root: mount point of tracefs.

    Raises:
        NotPermittedError: these rights cannot read them.
        UnsupportedError: it has none of them.
    """
    found = []
    for name in names:
        path = root / "events" / group / name / "format"
        try:
            found.append(Format.parse(path.read_text()))
        except PermissionError as error:
            raise NotPermittedError(f"{path} may not be read", help="run as root") from error
        except (OSError, ValueError):
            continue
    if not found:
        raise UnsupportedError(f"this kernel has no tracepoints {group}", help="a kernel with CONFIG_EVENT_TRACING")
    return found


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a tracepoint.

    Attributes:
        time_ns: time by the clock of perf.
        values: its fields, as :meth:`Format.read` returns them.
    """

    time_ns: int
    name: str
    values: Mapping[str, int | str]


class Tracepoints(Closing):
    """Events of all processors, from now until :meth:`close`.

    Attributes:
        lost: number of events that found no room because they were not read in time.

    Raises:
        NotPermittedError, UnsupportedError, MthpError: the kernel does not open them.
    """

    def __init__(self, formats: Sequence[Format]) -> None:
        self.lost = 0
        self._closing = contextlib.ExitStack()
        self._rings: list[tuple[Format, mmap.mmap]] = []
        room = max(RING_BYTES, mmap.PAGESIZE)
        try:
            for cpu, each in itertools.product(range(os.sysconf("SC_NPROCESSORS_CONF")), formats):
                # Not an instance of ftrace: a perf event is only a descriptor, which ends with this process however
                # that ends, and changes no file of tracefs.
                fd = perf_tracepoint(each.number, cpu)
                if fd is None:
                    continue
                self._closing.callback(os.close, fd)
                # One page of control words, then a power of two of pages (perf_event_open(2)).
                ring = self._closing.enter_context(mmap.mmap(fd, mmap.PAGESIZE + room))
                self._rings.append((each, ring))
        except OSError as error:
            self.close()
            raise _refused(error) from error

    def close(self) -> None:
        """End the events."""
        self._rings.clear()
        self._closing.close()

    def read(self) -> list[Event]:
        """Return the events since the last call, in the order of their times."""
        found = []
        for each, ring in self._rings:
            records, lost = take_records(ring)
            self.lost += lost
            found += [
                Event(struct.unpack_from("=Q", record)[0], each.name, each.read(record[12:])) for record in records
            ]
        # Each ring is in order, but a thread may have gone from one processor to another.
        return sorted(found, key=lambda event: event.time_ns)


def take_records(ring: mmap.mmap) -> tuple[list[bytes], int]:
    """Take the records in a ring of perf.

    Returns:
        The samples, each its time (uint64), the length of its data (uint32), and its data; and the number of lost ones.
    """
    head, tail = struct.unpack_from("=QQ", ring, _DATA_HEAD)
    size = len(ring) - mmap.PAGESIZE
    data = ring[mmap.PAGESIZE :] if tail < head else b""
    samples, lost = [], 0
    while tail < head:
        at = tail % size
        kind, _, length = struct.unpack_from("=IHH", data, at)
        # A record may continue at the beginning of the ring, except its first eight bytes.
        record = (data[at : at + length] + data[: max(0, at + length - size)])[8:]
        if kind == PERF_RECORD_SAMPLE:
            samples.append(record)
        elif kind == PERF_RECORD_LOST:
            lost += struct.unpack_from("=QQ", record)[1]
        tail += length
    # Last, because the kernel overwrites records below the tail.
    struct.pack_into("=Q", ring, _DATA_TAIL, tail)
    return samples, lost


def _refused(error: OSError) -> MthpError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermittedError("perf_event_open(2) is not allowed", help="run as root, or with CAP_PERFMON")
    if error.errno == errno.ENOSYS:
        return UnsupportedError("this kernel has no perf events", help="a kernel with CONFIG_PERF_EVENTS")
    if error.errno == errno.EMFILE:
        remedy = "allow more open files: each processor takes three (ulimit -n)"
        return MthpError("tracepoints cannot be opened: too many open files", help=remedy)
    return MthpError(f"tracepoints cannot be opened: {error.strerror}", help="end other programs that trace or profile")
