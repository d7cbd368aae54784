"""Stop every thread of a process, and let all of them go again as they were.

Each pitfall here was met:

- A thread may be about to take a signal when it is seized. Its first stop is then that signal's; it is continued with
  the signal until it stops for us (PTRACE_EVENT_STOP), otherwise the signal would be lost.
- Threads come and go meanwhile. The list is read again until it shows only stopped threads. A thread that exits cannot
  be seized (EPERM), yet writes to the process's memory until it has released it (clear_child_tid and the robust list,
  mm_release in kernel/fork.c): the window waits until it is gone or a zombie.
- A stop interrupts system calls. The kernel restarts most of them, but some return EINTR. Such an EINTR is turned into
  -ERESTARTNOHAND: restart the call unless a handler runs. (A timeout that is given as a length starts again. A read or
  write that has transferred a part returns that part, as after SIGSTOP and SIGCONT; this cannot be repaired.)
- A thread inside a restartable sequence (rseq(2)) would be sent to the abort handler on its way back to user mode. If
  its registers are changed first, the kernel forgets the sequence, and the thread would go on in it. So what is
  restored is :attr:`Tracee.home`, which is at the abort handler then.
- Threads in uninterruptible sleep (state D, vfork(2)) do not stop. After a short timeout all threads are released.

The state of each thread is in one table (:class:`~mthp.linux.mover.tracee.State`). A thread that was seized but has not
stopped cannot be detached (ptrace(2): ESRCH). Only the end of the tracing thread releases it (exit_ptrace,
kernel/ptrace.c), so every window has a thread of its own (:mod:`mthp.linux.mover.session`).
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
from mthp.linux.mover.arch.machine import Machine
from mthp.linux.mover.memory import ProcessMemory
from mthp.linux.mover.reentry import before_calls, make_again
from mthp.linux.mover.steps import Step, report
from mthp.linux.mover.taskfiles import Thread, inner_tids, read_task_file, task_ids, thread_count
from mthp.linux.mover.tracee import (
    BORROWED_STATES,
    STANDING,
    WALL,
    CannotStopError,
    State,
    Stopped,
    Tracee,
    check_thread,
)
from mthp.linux.process import Process

STOP_TIMEOUT_NS = 200_000_000
"""How long threads may take to stop before all of them are let go. Those that can stop do so in microseconds."""

WORKER_TIMEOUT_NS = 10_000_000_000
"""How long the thread that runs our code may take to stop, or to get on. Only a busy machine delays it."""

_POLL_SECONDS = 20e-6
_LONGEST_POLL_SECONDS = 5e-3
_PATIENCE = 0.125
_SPIN_NS = 30_000
"""For so long we look without sleeping, which would take longer than a thread needs to stop that has a processor."""

_STOP_SECONDS = 2e-6
"""What it takes a thread to stop, once it has a processor."""

_DYING = "ZX"
_STOPS_OF_OURS = (signal.SIGTRAP, signal.SIGTRAP | 0x80)
"""Those at a system call; these "signals" are none of the target's."""
_EXIT_CODES = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)


class FrozenProcess(ProcessMemory):
    """A process of which every thread stands still, from :meth:`stop` to :meth:`release`.

    All methods are to be called from one thread, whose end would release the process too.

    Args:
        timeout_ns: how long threads may take to stop.
        machine: that it runs on; by default the one that we run on.
        like: threads that were stopped before; what was made for them is used again if they still are the same.

    Attributes:
        machine: that it runs on.
        threads: the state of each thread that was seen, by TID.
        begun_ns: when :meth:`stop` began, by :func:`time.perf_counter_ns`.
    """

    def __init__(
        self,
        process: Process,
        timeout_ns: int = STOP_TIMEOUT_NS,
        machine: Machine | None = None,
        like: Stopped | None = None,
    ) -> None:
        super().__init__(process)
        self.machine = machine or native()
        self.threads: dict[int, Tracee] = {}
        self.begun_ns = 0
        self._like = like
        self._stopped: Stopped | None = None
        self._timeout_ns = timeout_ns
        self._deadline = self._waiting_since = 0

    @property
    def tracees(self) -> dict[int, Tracee]:
        """The threads that are stopped, by TID."""
        return {tid: tracee for tid, tracee in self.threads.items() if tracee.state in STANDING}

    @property
    def stopped(self) -> Stopped:
        """What is known of the threads that were stopped, in columns."""
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
            known: threads that :func:`check_threads` found harmless; others are looked at when they have stopped.

        Raises:
            CannotStopError: one is in uninterruptible sleep, traced by somebody else, or must not be given our code.
            NotPermittedError: tracing is not allowed.
        """
        self.begun_ns = time.perf_counter_ns()
        self._begin_to_wait(self._timeout_ns)
        parts = []
        while fresh := self._unstopped():
            part = self._stop(fresh)
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
        """Threads that may still run or write: all that were not stopped, less the dead."""
        standing = len(self.tracees)
        if standing and thread_count(self.process) == standing:
            return []
        return [tid for tid in task_ids(self.process) if tid not in self.threads]

    def _stop(self, tids: list[int]) -> Stopped | None:
        """Stop those of `tids` that are not exiting; None if all are.

        Raises:
            CannotStopError, NotPermittedError: as :meth:`stop`.
        """
        part = self._like if self._like is not None and self._like.tids == tids else Stopped(self.machine, tids)
        # Before anything else can go wrong: whoever was seized must be let go.
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
        """Do nothing if a thread that could not be seized is exiting; note whether it is dead already.

        For that, too, the kernel says EPERM.

        Raises:
            CannotStopError, NotPermittedError: it is not exiting.
        """
        text = read_task_file(self.process, tid, "status")
        thread = Thread.parse(tid, text) if text else None
        if thread is None or thread.state in _DYING or not _has_memory(self.process, tid):
            self.threads[tid] = Tracee(tid, State.DEAD)
            return
        if thread.tracer:
            raise CannotStopError(
                f"process {self.process.label} is traced already, by {thread.tracer}",
                help="a process has one tracer at a time: end the debugger, strace or other mthp",
            )
        # An exiting thread keeps its memory for a moment in which it cannot be seized any more.
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
        """Wait a moment: for many threads, or after a long time, a longer one.

        They need the processors that we leave to them, and where there is much else to do, to look often is to be in
        the way.

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
        """Wait until all of `tids` stop for PTRACE_INTERRUPT, with every signal before that delivered, or exit.

        Args:
            together: these threads, if they can be waited for together.

        Raises:
            CannotStopError: the time is up.
        """
        waiting = tids
        stops = together.wait() if together else None
        while waiting:
            still = []
            for index, tid in enumerate(waiting):
                stop = stops[index] if stops else self.poll(tid) or 0
                if stop >> 8 == ptrace.PTRACE_EVENT_STOP:
                    self.threads[tid].has_stopped()
                elif stop:
                    self.resume(tid, stop)
                    still.append(tid)
                elif stops or not self.has_exited(tid):
                    still.append(tid)
            if still:
                self._rest(len(still))
            waiting, stops = still, None

    def stop_again(self, tid: int) -> bool:
        """Stop a thread that was let run meanwhile; False if it exited.

        Raises:
            CannotStopError: the time is up.
        """
        ptrace.interrupt(tid)
        self._begin_to_wait(WORKER_TIMEOUT_NS)
        self._await_our_stops([tid])
        return self.threads[tid].state is not State.DEAD

    def poll(self, tid: int) -> int | None:
        """The stop that `tid` is in and that was not reported yet: signal | event << 8; None if there is none."""
        try:
            status = os.waitid(os.P_PID, tid, os.WSTOPPED | os.WNOHANG | WALL)
        except ChildProcessError:
            return None
        return None if status is None else status.si_status

    def has_exited(self, tid: int) -> bool:
        """Whether a seized thread has exited. It is reaped, so that its process can end.

        A leader that is our own child is left to whoever started it: one exit status, one taker.
        """
        try:
            status = os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL)
            # A stop of a tracee is reported whatever was asked for (wait_task_stopped, kernel/exit.c).
            if status is None or status.si_code not in _EXIT_CODES:
                if tid == self.process.pid:
                    self._reap_killed()
                return False
            if tid != self.process.pid or not self._is_our_child():
                os.waitid(os.P_PID, tid, os.WEXITED | os.WNOHANG | WALL)
        except ChildProcessError:
            pass
        self.threads[tid] = Tracee(tid, State.DEAD)
        return True

    def _reap_killed(self) -> None:
        """Reap threads that stood still and have exited, as only SIGKILL makes them: the whole process is ending.

        The end of its first thread is not told before all others are reaped (delay_group_leader, kernel/exit.c), and
        those that are traced are reaped by nobody else.
        """
        for tid in self.tracees:
            if tid != self.process.pid and not self.has_exited(tid):
                return

    def _is_our_child(self) -> bool:
        try:
            return self.process.status("PPid") == str(os.getpid())
        except MthpError:
            return True

    def resume(self, tid: int, stop: int) -> None:
        """Let `tid` go on from `stop`, with its signal if it is one of delivery. A stopped group keeps being so."""
        delivered = stop if not stop >> 8 and stop not in _STOPS_OF_OURS else 0
        try:
            ptrace.cont(tid, delivered)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise

    def check_thread(self, tid: int) -> None:
        """Do nothing if a stopped thread, as it is now, may be given our code.

        Raises:
            CannotStopError: it must not.
        """
        if text := read_task_file(self.process, tid, "status"):
            check_thread(self.process, Thread.parse(tid, text))

    def examine_again(self, tid: int) -> None:
        """Take a thread that has just stopped, and runs code of its own, as it is now.

        Raises:
            CannotStopError: it must not be given our code.
        """
        alone = Stopped(self.machine, [tid])
        alone.examine(self.process.label, self.read, self.read_words)
        self.threads[tid] = Tracee(tid, State.STOPPED)
        self.threads[tid].place(alone, 0)

    def abandon(self) -> None:
        """Do nothing more to the threads: the end of the tracing thread lets them go, and they restore themselves."""
        self.threads.clear()

    def release(self) -> None:
        """Let all threads go, those first put back whose registers are not their own."""
        self._put_back()
        again, standing = before_calls(self), self.tracees
        if not again and self._stopped is not None and standing.keys() == set(self._stopped.tids):
            for tid in self._stopped.detach():
                self.has_exited(tid)
        else:
            # Those that are not let go at once come last.
            for tid in sorted(standing, key=again.__contains__):
                try:
                    make_again(self, tid) if tid in again else ptrace.detach(tid)
                    report(Step.RELEASED)
                except OSError as error:
                    self._accept_exit(tid, error)
        for tid in [tid for tid, tracee in self.threads.items() if tracee.state is State.SEIZED]:
            self.has_exited(tid)
        self.threads.clear()
        self.close()

    def put_back_others(self, worker: Tracee) -> None:
        """Restore the registers of all threads but `worker`, which is the last."""
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
                report(Step.UNPARKED)
            except OSError as error:
                self._accept_exit(tracee.tid, error)

    def _accept_exit(self, tid: int, error: OSError) -> None:
        """Reap a thread that `error` shows to have been killed."""
        if error.errno != errno.ESRCH:
            raise error
        if not self.has_exited(tid):
            self.threads[tid].state = State.SEIZED


def _has_memory(process: Process, tid: int) -> bool:
    text = read_task_file(process, tid, "statm")
    return text is not None and any(int(word) for word in text.split())
