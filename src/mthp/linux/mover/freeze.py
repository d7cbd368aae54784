"""Stop every thread of a process, and release all of them as they were.

Threads in uninterruptible sleep (state D, vfork(2)) do not stop: after a short timeout all threads are released. The
state of each thread is in one table (:class:`~mthp.linux.mover.tracee.TraceeState`), with its registers, in which the
effects of the stop are repaired (:meth:`~mthp.linux.mover.tracee.Stopped.examine`).
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping

from mthp.errors import MthpError, NotPermittedError, TargetVanishedError
from mthp.linux.mover import ptrace
from mthp.linux.mover.arch import native
from mthp.linux.mover.arch.architecture import Architecture
from mthp.linux.mover.reentry import before_calls, make_again
from mthp.linux.mover.refuse.threads import check_thread
from mthp.linux.mover.steps import Step, reached
from mthp.linux.mover.targetmemory import ProcessMemory
from mthp.linux.mover.taskfiles import Thread, inner_tids, read_task_file, task_ids, thread_count
from mthp.linux.mover.tracee import BORROWED_STATES, STANDING, WALL, CannotStopError, Stopped, Tracee, TraceeState
from mthp.linux.process import Process

STOP_TIMEOUT_NS = 200_000_000
"""Nanoseconds that threads may take to stop before all are released. Those that can stop do so in microseconds."""

WORKER_TIMEOUT_NS = 10_000_000_000
"""Nanoseconds that the thread with injected code may take to stop, or to get on. Only a busy machine delays it."""

_POLL_SECONDS = 20e-6
_LONGEST_POLL_SECONDS = 5e-3
_PATIENCE = 0.125
_SPIN_NS = 30_000
"""Nanoseconds of polling before the first sleep: a running thread stops sooner than the shortest sleep ends."""

_STOP_SECONDS = 2e-6
"""Seconds that a thread takes to stop, once it has a processor."""

_DYING = "ZX"
_STOPS_OF_OURS = (signal.SIGTRAP, signal.SIGTRAP | 0x80)
"""Stops at a system call; these "signals" are not the target's."""
_EXIT_CODES = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


class FrozenProcess(ProcessMemory):
    """A process with all threads stopped, from :meth:`stop` to :meth:`release`.

    Methods that wait for a thread to stop raise CannotStopError if it does not in time.

    Call all methods from one thread; when that thread ends, the kernel releases the process.

    Args:
        timeout_ns: time that threads may take to stop, in nanoseconds.
        machine: architecture of the target; by default that of this program.
        like: threads of an earlier window; their tables are used again if the threads are the same.
        worker_timeout_ns: nanoseconds that the thread with injected code may take to stop, or to get on.

    Attributes:
        threads: the state of each thread that was seen, by TID.
        begun_ns: start of :meth:`stop`, by :func:`time.perf_counter_ns`.
    """

    def __init__(
        self,
        process: Process,
        timeout_ns: int = STOP_TIMEOUT_NS,
        machine: Architecture | None = None,
        like: Stopped | None = None,
        worker_timeout_ns: int = WORKER_TIMEOUT_NS,
    ) -> None:
        super().__init__(process)
        self.machine = machine or native()
        self.threads: dict[int, Tracee] = {}
        self.begun_ns = 0
        self.worker_timeout_ns = worker_timeout_ns
        self._like = like
        self._stopped: Stopped | None = None
        self._timeout_ns = timeout_ns
        self._deadline = self._waiting_since = 0

    @property
    def tracees(self) -> dict[int, Tracee]:
        """Return the threads that are stopped, by TID."""
        return {tid: tracee for tid, tracee in self.threads.items() if tracee.state in STANDING}

    @property
    def stopped(self) -> Stopped:
        """Return the columns of the threads that were stopped."""
        if self._stopped is None:
            raise RuntimeError("the process was not stopped")
        return self._stopped

    def inner_tids(self) -> list[int]:
        """Return the numbers of the stopped threads in the PID namespace of their process."""
        if not self.stopped.inner_tids:
            self.stopped.inner_tids = inner_tids(self.process, self.stopped.tids)
        return self.stopped.inner_tids

    def stop(self, known: Mapping[int, Thread]) -> None:
        """Stop all threads.

        Args:
            known: threads that :func:`check_threads` found harmless; others are checked when they have stopped.

        Raises:
            CannotStopError: one sleeps uninterruptibly, has another tracer, or must not run injected code.
            NotPermittedError: tracing is not allowed.
        """
        self.begun_ns = time.perf_counter_ns()
        self._begin_to_wait(self._timeout_ns)
        parts = []
        # Threads come and go meanwhile: read the list again until it shows only stopped threads.
        while fresh := self._unstopped():
            part = self._stop(fresh)
            # All of them are exiting: they still write to the memory, and are waited for.
            if part is None:
                self._rest()
                continue
            for tid in part.tids:
                if tid not in known:
                    self.check_thread(tid)
            part.examine(self.process.label, self.read, self.read_words)
            parts.append(part)
        if not self.tracees:
            self.process.check_alive()
            raise TargetVanishedError(f"process {self.process.label} is exiting")
        self._stopped = stopped = Stopped.joined(parts)
        for row, tid in enumerate(stopped.tids):
            self.threads[tid].place(stopped, row)

    def _unstopped(self) -> list[int]:
        """Return the threads that may still run or write: all that were not stopped, less the dead."""
        standing = len(self.tracees)
        # One stat(2) for all threads. It counts exiting and dead ones too, so nothing still runs or writes.
        if standing and thread_count(self.process) == standing:
            return []
        return [tid for tid in task_ids(self.process) if tid not in self.threads]

    def _stop(self, tids: list[int]) -> Stopped | None:
        """Stop those of `tids` that are not exiting; return None if all are."""
        part = self._like if self._like is not None and self._like.tids == tids else Stopped(self.machine, tids)
        # Recorded before any error can occur, because every seized thread must be released.
        self.threads |= {tid: Tracee(tid) for tid in tids}
        exiting = part.attach()
        for tid in exiting:
            del self.threads[tid]
        for tid, error in exiting.items():
            self._explain(tid, error)
        self._await_our_stops([tid for tid in tids if tid not in exiting], part if not exiting else None)
        stopped = self.tracees
        standing = [tid for tid in tids if tid in stopped]
        if standing == tids:
            return part
        return Stopped(self.machine, standing) if standing else None

    def _explain(self, tid: int, error: int) -> None:
        """Do nothing if a thread that could not be seized is exiting; record it as dead if it is.

        The kernel's error is EPERM for an exiting thread, too.

        Raises:
            CannotStopError, NotPermittedError: the thread is not exiting.
        """
        # Until it releases the memory it writes there: clear_child_tid, robust list (exit_mm_release, kernel/fork.c).
        text = read_task_file(self.process, tid, "status")
        thread = Thread.parse(tid, text) if text else None
        if thread is None or thread.state in _DYING or not _has_memory(self.process, tid):
            self.threads[tid] = Tracee(tid, TraceeState.DEAD)
            return
        # A second tracer gets EPERM (ptrace_attach, kernel/ptrace.c).
        if thread.tracer:
            raise CannotStopError(
                f"process {self.process.label} is traced already, by {thread.tracer}",
                help="a process has one tracer at a time: end the debugger, strace or other mthp",
            )
        # An exiting thread keeps its memory for a moment in which it cannot be seized.
        if error == errno.EPERM and time.monotonic_ns() > self._deadline:
            raise NotPermittedError(
                f"not permitted to trace process {self.process.label}",
                help="run as the same user or with CAP_SYS_PTRACE (root);"
                " /proc/sys/kernel/yama/ptrace_scope may forbid it",
            )

    def _begin_to_wait(self, timeout_ns: int) -> None:
        self._waiting_since = time.monotonic_ns()
        self._deadline = self._waiting_since + timeout_ns

    def _rest(self, waiting: int = 0) -> None:
        """Wait a moment, longer for many threads and after a long time.

        The threads need the processors, and on a busy machine frequent polling would delay them.

        Raises:
            CannotStopError: the time is up.
        """
        now = time.monotonic_ns()
        if now > self._deadline:
            raise CannotStopError(
                f"process {self.process.label} does not stop",
                help="a thread sleeps uninterruptibly (state D), waits in vfork(2), or is exiting: try again later",
            )
        if now - self._waiting_since < _SPIN_NS:
            os.sched_yield()
            return
        waited = (now - self._waiting_since) * 1e-9
        time.sleep(min(_POLL_SECONDS + max(waiting * _STOP_SECONDS, waited * _PATIENCE), _LONGEST_POLL_SECONDS))

    def _await_our_stops(self, tids: list[int], together: Stopped | None = None) -> None:
        """Wait until each of `tids` has exited, or stops for PTRACE_INTERRUPT with every earlier signal delivered.

        Args:
            together: the columns of these threads, if one table of calls can wait for them.
        """
        waiting = tids
        stops = together.wait() if together else None
        while waiting:
            still = []
            for index, tid in enumerate(waiting):
                stop = stops[index] if stops else self.poll(tid) or 0
                # With SIGTRAP for PTRACE_INTERRUPT, with a stopping signal in a stopped group (do_jobctl_trap).
                if stop >> 8 == ptrace.PTRACE_EVENT_STOP:
                    self.threads[tid].has_stopped()
                elif stop:
                    # It was about to take a signal when it was seized. Without this the signal would be lost.
                    self.resume(tid, stop)
                    still.append(tid)
                elif stops or not self.has_exited(tid):
                    still.append(tid)
            if still:
                self._rest(len(still))
            waiting, stops = still, None

    def stop_again(self, tid: int) -> bool:
        """Stop a thread that was resumed meanwhile; return False if it exited."""
        ptrace.interrupt(tid)
        self._begin_to_wait(self.worker_timeout_ns)
        self._await_our_stops([tid])
        return self.threads[tid].state is not TraceeState.DEAD

    def poll(self, tid: int) -> int | None:
        """Return the unreported stop that `tid` is in: signal | event << 8; None if there is none."""
        try:
            status = os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOHANG | WALL)
        except ChildProcessError:
            return None
        return None if status is None else status.si_status

    def has_exited(self, tid: int) -> bool:
        """Return whether a seized thread has exited. It is reaped, so that its process can end.

        A leader that is this process's child is not reaped: its exit status belongs to the code that started it.
        """
        try:
            status = os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL)
            # A stop of a tracee is reported whatever the flags are (wait_task_stopped, kernel/exit.c).
            if status is None or status.si_code not in _EXIT_CODES:
                if tid == self.process.pid:
                    self._reap_killed()
                return False
            if tid != self.process.pid or not self._is_our_child():
                os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | WALL)
        except ChildProcessError:
            pass
        self.threads[tid] = Tracee(tid, TraceeState.DEAD)
        return True

    def _reap_killed(self) -> None:
        """Reap stopped threads that have exited, as only SIGKILL makes them: the whole process is ending.

        The kernel does not report the end of the first thread before all others are reaped (delay_group_leader,
        kernel/exit.c), and only the tracer can reap traced threads.
        """
        for tid in self.tracees:
            if tid != self.process.pid and not self.has_exited(tid):
                return

    def _is_our_child(self) -> bool:
        try:
            return self.process.status("PPid") == str(os.getpid())
        except MthpError:
            return True  # In doubt its exit status is left alone.

    def resume(self, tid: int, stop: int) -> None:
        """Continue `tid` from `stop`, with its signal if it is one of delivery. A stopped group stays stopped."""
        # Once it is released, a thread of a stopped group stops again by itself (__ptrace_unlink, kernel/ptrace.c).
        delivered = stop if not stop >> 8 and stop not in _STOPS_OF_OURS else 0
        try:
            ptrace.cont(tid, delivered)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise

    def check_thread(self, tid: int) -> None:
        """Raise CannotStopError if a stopped thread, as it is now, must not run injected code."""
        if text := read_task_file(self.process, tid, "status"):
            check_thread(self.process, Thread.parse(tid, text))

    def examine_again(self, tid: int) -> None:
        """Read the state of a thread that has just stopped; raise CannotStopError if it must not run injected code."""
        alone = Stopped(self.machine, [tid])
        alone.examine(self.process.label, self.read, self.read_words)
        self.threads[tid] = Tracee(tid, TraceeState.STOPPED)
        self.threads[tid].place(alone, 0)

    def abandon(self) -> None:
        """Do nothing more to the threads: the end of the tracing thread releases them; they restore themselves."""
        self.threads.clear()

    def release(self) -> None:
        """Release all threads; first put back those with borrowed registers."""
        self._put_back()
        again, standing = before_calls(self), self.tracees
        if not again and self._stopped is not None and standing.keys() == set(self._stopped.tids):
            for tid in self._stopped.detach():
                self.has_exited(tid)
        else:
            # Those that are not released at once come last.
            for tid in sorted(standing, key=again.__contains__):
                try:
                    make_again(self, tid) if tid in again else ptrace.detach(tid)
                    reached(Step.RELEASED)
                except OSError as error:
                    self._accept_exit(tid, error)
        # Only reaped: one that has not stopped cannot be detached (ESRCH, ptrace(2)); our thread's end releases it.
        for tid in [tid for tid, tracee in self.threads.items() if tracee.state is TraceeState.SEIZED]:
            self.has_exited(tid)
        self.threads.clear()
        self.close()

    def put_back_others(self, worker: Tracee) -> None:
        """Restore the registers of all threads but `worker`, which is restored last."""
        for tid in self.stopped.put_back(worker.row):
            self.has_exited(tid)
        for tracee in self.tracees.values():
            if tracee is not worker:
                tracee.is_put_back()

    def _put_back(self) -> None:
        for tracee in self.tracees.values():
            if tracee.state not in BORROWED_STATES:
                continue
            try:
                tracee.put_back()
                reached(Step.UNPARKED)
            except OSError as error:
                self._accept_exit(tracee.tid, error)

    def _accept_exit(self, tid: int, error: OSError) -> None:
        """Reap a thread that was killed, as `error` shows; raise other errors."""
        if error.errno != errno.ESRCH:
            raise error
        # Killed, but not gone yet: neither its registers nor its release concern this process any more.
        if not self.has_exited(tid):
            self.threads[tid].state = TraceeState.SEIZED


def _has_memory(process: Process, tid: int) -> bool:
    text = read_task_file(process, tid, "statm")
    return text is not None and any(int(word) for word in text.split())
