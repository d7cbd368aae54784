"""Find new, changed and exited processes: from events of the kernel, or by polling.

:class:`ProcConnector` listens to the process events connector (drivers/connector/cn_proc.c): the kernel sends a netlink
message for every fork, exec, rename and exit. It works in the first PID and network namespaces, and took CAP_NET_ADMIN
before Linux 6.6. :class:`ProcPolling` needs no rights.

Both return the events since the last call as :class:`Changes`. A process that was born and ended in between is in none
of its sets, so it costs the caller nothing but two events.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from mthp.errors import NotPermittedError, UnsupportedError
from mthp.linux.process import list_pids

SWEEP_SECONDS = 10.0
"""Seconds between two listings of all processes, where they have to be polled."""

MAX_GAP = 4096
"""Limit of the new PIDs that are tried one by one; above it all processes are listed."""

RECEIVE_BUFFER = 8 << 20
"""Bytes that the kernel may buffer for the socket: some 20 000 events."""

MOST_EVENTS = 1 << 16
"""Events taken at a time, more than the kernel buffers, because a call would not end if events came too fast."""

_ACK_SECONDS = 0.5

# include/uapi/linux/netlink.h, connector.h and cn_proc.h
_NETLINK_CONNECTOR = 11
_CN_IDX_PROC, _CN_VAL_PROC = 1, 1
_NLMSG_DONE = 3
_PROC_CN_MCAST_LISTEN = 1
_NONE, _FORK, _EXEC, _COMM, _EXIT = 0, 1, 2, 0x200, 0x80000000
_HEADERS = struct.Struct("=IHHII" + "IIIIHH")
"""struct nlmsghdr, struct cn_msg."""
_WHAT = struct.Struct("=I")
_WORDS = struct.Struct("=6I")
_WHAT_AT = _HEADERS.size
_DATA_AT = _WHAT_AT + 16
"""Behind ``what``, ``cpu`` and ``timestamp_ns`` of struct proc_event."""

# include/uapi/linux/filter.h and bpf_common.h
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_LD_WORD, _JUMP, _JEQ_K, _JEQ_X, _TAX, _RET = 0x20, 0x05, 0x15, 0x1D, 0x07, 0x06


class SharingEvent(NamedTuple):
    """A process begins to share its parent's memory, or shares no memory any more.

    Attributes:
        kind: what the process did.
        pid: PID of the process.
        parent: PID of its parent; 0 where it is unknown, as for exec.
    """

    kind: Literal["fork", "exec", "exit"]
    pid: int
    parent: int = 0


@dataclass(slots=True)
class Changes:
    """Events of processes since the last call, by PID.

    Attributes:
        born: processes that were forked.
        changed: processes that began another program, or took another name.
        gone: processes that ended, and existed at the last call.
        sharing: all forks, execs and exits, in their order.
        lost: whether events may be missing: list all processes.
    """

    born: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    sharing: list[SharingEvent] = field(default_factory=list)
    lost: bool = False


class ProcessEvents(Protocol):
    """The source of changes."""

    name: str
    """How it gets the changes, as text for users."""

    def fileno(self) -> int:
        """Return a descriptor that becomes readable after an event; -1 if the source has to be polled."""

    def changes(self) -> Changes:
        """Return the events since the last call. Does not wait."""

    def close(self) -> None:
        """Stop."""


class ProcConnector:
    """The kernel's process events.

    Raises:
        NotPermittedError: CAP_NET_ADMIN is missing.
        UnsupportedError: this kernel has no connector, or not for this PID namespace.
    """

    name = "process events of the kernel (proc connector)"

    def __init__(self) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_CONNECTOR)
        except OSError as error:
            raise UnsupportedError(
                f"no netlink connector: {error.strerror}",
                help="the first network namespace, and a kernel with CONFIG_PROC_EVENTS",
            ) from error
        self._buffer = bytearray(256)
        try:
            self._listen()
        except OSError as error:
            self._socket.close()
            if error.errno in (errno.EPERM, errno.EACCES):
                raise NotPermittedError(
                    "not permitted to listen to process events", help="CAP_NET_ADMIN (run as root)"
                ) from error
            raise UnsupportedError(
                f"no process events: {error.strerror or error}",
                help="the first PID and network namespaces, and a kernel with CONFIG_PROC_EVENTS",
            ) from error

    def _listen(self) -> None:
        # Only events of whole processes, so that a program that starts threads costs nothing; before bind(), so that no
        # other message is in the buffer.
        _attach(self._socket, _only_processes())
        try:
            # Above net.core.rmem_max, which takes CAP_NET_ADMIN (socket(7)).
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except OSError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._socket.bind((0, _CN_IDX_PROC))
        wish = _WHAT.pack(_PROC_CN_MCAST_LISTEN)
        headers = _HEADERS.pack(
            *(_HEADERS.size + len(wish), _NLMSG_DONE, 0, 0, 0),
            *(_CN_IDX_PROC, _CN_VAL_PROC, 0, 0, len(wish), 0),
        )
        self._socket.send(headers + wish)
        # In another PID namespace the kernel sends neither events nor an error: it does not answer.
        self._socket.settimeout(_ACK_SECONDS)
        deadline = time.monotonic() + _ACK_SECONDS
        while True:
            what, words = self._next()
            if what == _NONE:
                if words[0]:
                    raise OSError(words[0], os.strerror(words[0]))
                break
            if time.monotonic() > deadline:
                raise TimeoutError("the kernel does not answer")
        self._socket.setblocking(False)

    def _next(self) -> tuple[int, tuple[int, ...]]:
        """Return one message: the kind of event, and its first words."""
        size = self._socket.recv_into(self._buffer)
        if size < _DATA_AT + _WORDS.size:
            self._buffer[size:] = bytes(len(self._buffer) - size)
        return _WHAT.unpack_from(self._buffer, _WHAT_AT)[0], _WORDS.unpack_from(self._buffer, _DATA_AT)

    def fileno(self) -> int:
        return self._socket.fileno()

    def changes(self) -> Changes:
        """Return the events that have come, `MOST_EVENTS` at most, without processes born and ended since."""
        changes = Changes()
        for _ in range(MOST_EVENTS):
            try:
                what, words = self._next()
            except BlockingIOError:
                break
            except OSError as error:
                # The buffer was full: the kernel reports it once, and goes on with the next message (netlink(7)).
                if error.errno != errno.ENOBUFS:
                    raise
                changes.lost = True
                continue
            if what == _FORK:
                changes.born.add(words[3])
                # The PID of a process that ended since the last call may be in use again.
                changes.gone.discard(words[3])
                changes.sharing.append(SharingEvent("fork", words[3], words[1]))
            elif what in (_EXEC, _COMM):
                if what == _EXEC:
                    changes.sharing.append(SharingEvent("exec", words[1]))
                if words[1] not in changes.born:
                    changes.changed.add(words[1])
            elif what == _EXIT:
                changes.changed.discard(words[1])
                # struct exit_proc_event: the thread group of the parent is the last field.
                changes.sharing.append(SharingEvent("exit", words[1], words[5]))
                if words[1] in changes.born:
                    changes.born.discard(words[1])
                else:
                    changes.gone.add(words[1])
        return changes

    def close(self) -> None:
        self._socket.close()


class ProcPolling:
    """A source that polls for new processes."""

    name = "reading /proc"

    def __init__(self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic) -> None:
        self._proc = str(proc)
        self._clock = clock
        self._loadavg = os.open(proc / "loadavg", os.O_RDONLY | os.O_CLOEXEC)
        # Before the list: a process that starts between the two is in both, and is not missed.
        self._last = self._last_pid()
        self._known = set(list_pids(self._proc))
        self._sweep_at = clock() + SWEEP_SECONDS

    def fileno(self) -> int:
        return -1

    def changes(self) -> Changes:
        """Return the new processes since the last call; exited ones are found at the next listing of all."""
        now, last = self._clock(), self._last_pid()
        # PIDs ascend, and /proc/loadavg has the last one (proc_loadavg(5)): only those in between can be new. But one
        # can be chosen (clone3(2), ns_last_pid), or come from another PID namespace: list all at times.
        if now >= self._sweep_at or not 0 <= last - self._last <= MAX_GAP:
            self._sweep_at = now + SWEEP_SECONDS
            pids = set(list_pids(self._proc))
            changes = Changes(born=pids - self._known, gone=self._known - pids)
            self._known, self._last = pids, last
            return changes
        born = {pid for pid in range(self._last + 1, last + 1) if self._is_process(pid)} - self._known
        self._last = last
        self._known |= born
        return Changes(born=born)

    def _last_pid(self) -> int:
        return int(os.pread(self._loadavg, 128, 0).split()[-1])

    def _is_process(self, pid: int) -> bool:
        """Return whether it is a process. The directory of a thread can be opened, too, but is not listed."""
        try:
            with open(f"{self._proc}/{pid}/status", "rb") as file:
                text = file.read(512)
        except OSError:
            return False
        return b"\nTgid:\t%d\n" % pid in text

    def close(self) -> None:
        os.close(self._loadavg)


def open_events() -> tuple[ProcessEvents, str]:
    """Return the best source of changes for these rights, and the reason against a better one, or ``""``."""
    try:
        return ProcConnector(), ""
    except (NotPermittedError, UnsupportedError) as error:
        return ProcPolling(), f"{error.message}; {error.help} would report new processes at once"


Instruction = tuple[int, int, int, int]
"""struct sock_filter: code, jump if true, jump if false, constant."""


def _only_processes() -> list[Instruction]:
    """Return a filter that passes events of whole processes: forks of processes, execs, renames and exits of leaders.

    Words are loaded in network order, so the constants are converted to it. Jumps are relative.
    """
    leader, child, compare, accept, refuse = 6, 10, 13, 14, 15
    return [
        (_LD_WORD, 0, 0, _WHAT_AT),
        (_JEQ_K, accept - 2, 0, socket.htonl(_NONE)),
        (_JEQ_K, accept - 3, 0, socket.htonl(_EXEC)),
        (_JEQ_K, child - 4, 0, socket.htonl(_FORK)),
        (_JEQ_K, leader - 5, 0, socket.htonl(_EXIT)),
        (_JEQ_K, leader - 6, refuse - 6, socket.htonl(_COMM)),
        # PID and thread group of the process of the event.
        (_LD_WORD, 0, 0, _DATA_AT),
        (_TAX, 0, 0, 0),
        (_LD_WORD, 0, 0, _DATA_AT + 4),
        (_JUMP, 0, 0, compare - 10),
        # PID and thread group of the child.
        (_LD_WORD, 0, 0, _DATA_AT + 8),
        (_TAX, 0, 0, 0),
        (_LD_WORD, 0, 0, _DATA_AT + 12),
        (_JEQ_X, 0, 1, 0),
        (_RET, 0, 0, 0xFFFFFFFF),
        (_RET, 0, 0, 0),
    ]


def _attach(sock: socket.socket, program: Iterable[Instruction]) -> None:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    memory = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count, and a pointer at its natural alignment.
    count_and_pointer = struct.pack("@HP", len(code) // 8, ctypes.addressof(memory))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, count_and_pointer)
