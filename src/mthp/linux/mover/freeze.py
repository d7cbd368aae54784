"""Stop every thread of a process, and let all of them go again as they were.

Each pitfall here was met:

- A thread may be about to take a signal when it is seized. Its first stop is then that signal's; it is continued with
  the signal until it stops for us (PTRACE_EVENT_STOP), otherwise the signal would be lost.
- Threads come and go meanwhile. The list is read again until it shows nobody but those who stand still. A thread that
  exits cannot be seized (EPERM), yet still writes to the process's memory until it has given it up
  (clear_child_tid and the robust list, mm_release in kernel/fork.c): the window waits until it is gone or a zombie.
- A stop interrupts system calls. Most are restarted by the kernel without anyone noticing, but some return EINTR for
  good. Where a thread stands with such an EINTR in its hand, it is turned into -ERESTARTNOHAND: restart the call unless
  a handler runs, in which case it is EINTR after all. (A timeout that is given as a length starts again. A read or
  write that has transferred a part returns that part, as after SIGSTOP and SIGCONT; this cannot be made good.)
- A thread inside a restartable sequence (rseq(2)) would be sent to the abort handler on its way back to user mode. If
  it is given other registers first, the kernel forgets the sequence, and the thread would go on in it as if it had not
  been disturbed. So whoever changes registers restores :attr:`Tracee.home`, which is at the abort handler then.
- Threads in uninterruptible sleep (state D, vfork(2)) do not stop. After a short timeout everything is let go.

A thread that has been seized but has not stopped cannot be detached (ptrace(2): ESRCH). What lets go of it in any case
is the end of the thread that traces (exit_ptrace, kernel/ptrace.c), which is why every window has a thread of its own
(:mod:`mthp.linux.mover.session`).
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from functools import cached_property

from mthp.errors import MthpError, NotPermittedError, TargetVanishedError
from mthp.linux.mover import ptrace
from mthp.linux.mover.steps import Observer, Step, ignore
from mthp.linux.mover.taskfiles import Thread, read_task_file, task_ids
from mthp.linux.mover.tracee import CannotStopError, Tracee, check_thread, examine
from mthp.linux.process import Process

STOP_TIMEOUT_NS = 200_000_000
"""How long threads may take to stop before all of them are let go. Those that can stop do so in microseconds."""

WORKER_TIMEOUT_NS = 10_000_000_000
"""How long the thread that runs our code may take to stop. Only a busy machine delays it."""

_WALL = 0x40000000
_POLL_SECONDS = 20e-6
_DYING = "ZX"
_EXIT_CODES = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


class FrozenProcess:
    """A process of which every thread stands still, from :meth:`stop` to :meth:`release`.

    All methods are to be called from one thread, whose end would release the process too.

    Args:
        process: the target.
        timeout_ns: how long threads may take to stop.

    Attributes:
        process: the target.
        tracees: its threads, by TID.
        begun_ns: when :meth:`stop` began, by :func:`time.perf_counter_ns`.
    """

    def __init__(self, process: Process, timeout_ns: int = STOP_TIMEOUT_NS) -> None:
        self.process = process
        self.tracees: dict[int, Tracee] = {}
        self.begun_ns = 0
        self._timeout_ns = timeout_ns
        self._deadline = 0
        self._seized: set[int] = set()
        self._dead: set[int] = set()
        self._memory = -1

    @cached_property
    def memory(self) -> int:
        """A file descriptor of ``/proc/PID/mem`` that reads and writes; valid until :meth:`release`."""
        try:
            self._memory = os.open(f"/proc/{self.process.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self.process.fail(error, "its memory")
        return self._memory

    def stop(self, known: Mapping[int, Thread]) -> None:
        """Stop all threads.

        Args:
            known: threads that :func:`check_threads` found harmless; others are looked at when they have stopped.

        Raises:
            CannotStopError: one is in uninterruptible sleep, traced by somebody else, or must not be given our code.
            NotPermittedError: tracing is not allowed.
            TargetVanishedError: the process is gone.
        """
        self.begun_ns = time.perf_counter_ns()
        self._deadline = time.monotonic_ns() + self._timeout_ns
        while fresh := self._unstopped():
            seized = [tid for tid in fresh if self._seize(tid)]
            for tid in seized:
                if self._await_our_stop(tid):
                    if tid not in known:
                        self._check_stranger(tid)
                    self.examine(tid)
            if not seized:
                self._rest()
        if not self.tracees:
            self.process.check_alive()
            raise TargetVanishedError(f"process {self.process.label} is exiting")

    def _unstopped(self) -> list[int]:
        """Threads that may still run or write: all that were not stopped, less the dead."""
        return [tid for tid in task_ids(self.process) if tid not in self.tracees and tid not in self._dead]

    def _seize(self, tid: int) -> bool:
        """Seize and interrupt; False if the thread is exiting.

        Raises:
            CannotStopError, NotPermittedError: as :meth:`stop`.
        """
        try:
            if tid not in self._seized:
                ptrace.seize(tid)
                self._seized.add(tid)
            ptrace.interrupt(tid)
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.EPERM):
                raise
            if tid not in self._seized:
                self._explain(tid, error)
                return False
        return True

    def _explain(self, tid: int, error: OSError) -> None:
        """Do nothing if the thread is exiting, for which the kernel also says EPERM; note whether it is dead already.

        Raises:
            CannotStopError, NotPermittedError: it is not exiting.
        """
        text = read_task_file(self.process, tid, "status")
        thread = Thread.parse(tid, text) if text else None
        if thread is None or thread.state in _DYING or not _has_memory(self.process, tid):
            self._dead.add(tid)
            return
        if thread.tracer:
            raise CannotStopError(
                f"process {self.process.label} is traced already, by {thread.tracer}",
                help="a process has one tracer at a time: end the debugger, strace or other mthp",
            )
        # An exiting thread keeps its memory for a moment in which it cannot be seized any more.
        if error.errno == errno.EPERM and time.monotonic_ns() > self._deadline:
            raise NotPermittedError(
                f"not permitted to trace process {self.process.label}",
                help="run as the same user or with CAP_SYS_PTRACE (root);"
                " /proc/sys/kernel/yama/ptrace_scope may forbid it",
            ) from error

    def _rest(self) -> None:
        """Wait a moment.

        Raises:
            CannotStopError: the time is up.
        """
        if time.monotonic_ns() > self._deadline:
            raise CannotStopError(
                f"process {self.process.label} does not stop",
                help="a thread sleeps uninterruptibly (state D), waits in vfork(2), or is exiting: try again later",
            )
        time.sleep(_POLL_SECONDS)

    def _await_our_stop(self, tid: int) -> bool:
        """Wait until `tid` stops for PTRACE_INTERRUPT, with every signal before that delivered; False if it exited.

        Raises:
            CannotStopError: the time is up.
        """
        while True:
            stop = self.poll(tid)
            if stop is None:
                if self.has_exited(tid):
                    return False
                self._rest()
            elif stop >> 8 == ptrace.PTRACE_EVENT_STOP:
                return True
            else:
                self.resume(tid, stop)

    def stop_again(self, tid: int) -> bool:
        """Stop a thread that was let run meanwhile; False if it exited.

        Raises:
            CannotStopError: the time is up.
        """
        ptrace.interrupt(tid)
        return self.await_event_stop(tid)

    def await_event_stop(self, tid: int) -> bool:
        """Wait for the stop of a thread of ours that was interrupted; False if it exited.

        Raises:
            CannotStopError: the time is up.
        """
        self._deadline = time.monotonic_ns() + WORKER_TIMEOUT_NS
        return self._await_our_stop(tid)

    def poll(self, tid: int) -> int | None:
        """The stop that `tid` is in and that was not reported yet: signal | event << 8; None if there is none."""
        try:
            status = os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOHANG | _WALL)
        except ChildProcessError:
            return None
        return None if status is None else status.si_status

    def has_exited(self, tid: int) -> bool:
        """Whether a seized thread has exited. It is reaped, so that its process can end.

        A leader that is our own child is left to whoever started it: one exit status, one taker.
        """
        try:
            status = os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
            # A stop of a tracee is reported whatever was asked for (wait_task_stopped, kernel/exit.c).
            if status is None or status.si_code not in _EXIT_CODES:
                return False
            if tid != self.process.pid or not self._is_our_child():
                os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | _WALL)
        except ChildProcessError:
            pass
        self._dead.add(tid)
        self.tracees.pop(tid, None)
        return True

    def _is_our_child(self) -> bool:
        try:
            return self.process.status("PPid") == str(os.getpid())
        except MthpError:
            return True

    def resume(self, tid: int, stop: int) -> None:
        """Let `tid` go on from `stop`, with its signal if it is one of delivery. A stopped group keeps being so."""
        delivered = stop & 0xFF if not stop >> 8 and stop & 0xFF != signal.SIGTRAP else 0
        try:
            ptrace.cont(tid, delivered)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise

    def _check_stranger(self, tid: int) -> None:
        """Do nothing if a thread that has just appeared may be given our code.

        Raises:
            CannotStopError: it must not.
        """
        if text := read_task_file(self.process, tid, "status"):
            check_thread(self.process, Thread.parse(tid, text))

    def examine(self, tid: int) -> None:
        """Take a thread that has just stopped, and runs code of its own, into :attr:`tracees`.

        Raises:
            CannotStopError: it must not be given our code.
        """
        self.tracees[tid] = examine(self.process.label, tid, self.read)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes of the target's memory.

        Raises:
            TargetVanishedError: it is gone, or has a new memory since execve(2).
            MthpError: nothing is mapped there.
        """
        try:
            data = os.pread(self.memory, size, address)
        except OSError as error:
            self.process.fail(error, f"its memory at {address:#x}")
        if len(data) != size:
            raise TargetVanishedError(f"process {self.process.label} gave up its memory")
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write to the target's memory, also where it may not write itself.

        Raises:
            TargetVanishedError, MthpError: as :meth:`read`.
        """
        try:
            written = os.pwrite(self.memory, data, address)
        except OSError as error:
            self.process.fail(error, f"its memory at {address:#x}")
        if written != len(data):
            raise TargetVanishedError(f"process {self.process.label} gave up its memory")

    def abandon(self) -> None:
        """Do nothing more to the threads: the end of the tracing thread lets them go, and they restore themselves."""
        self.tracees.clear()
        self._seized.clear()

    def release(self, observer: Observer = ignore) -> None:
        """Let all threads go, those first put back whose registers are not their own."""
        for tracee in list(self.tracees.values()):
            try:
                if tracee.touched:
                    tracee.put_back()
                    observer(Step.UNPARKED)
            except OSError as error:
                self._accept_exit(tracee.tid, error)
        for tracee in list(self.tracees.values()):
            try:
                ptrace.detach(tracee.tid)
                observer(Step.RELEASED)
            except OSError as error:
                self._accept_exit(tracee.tid, error)
        for tid in self._seized - self.tracees.keys() - self._dead:
            self.has_exited(tid)
        self.tracees.clear()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _accept_exit(self, tid: int, error: OSError) -> None:
        """Reap a thread that `error` shows to have been killed."""
        if error.errno != errno.ESRCH:
            raise error
        self.has_exited(tid)
        self.tracees.pop(tid, None)


def _has_memory(process: Process, tid: int) -> bool:
    text = read_task_file(process, tid, "statm")
    return text is not None and any(int(word) for word in text.split())
