"""Signals that end a command cleanly: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal is closed).

A command that works in steps calls :func:`stopping_on_signals`, finishes the current step after a signal, and reports.
In all other code these signals raise KeyboardInterrupt or a subclass, so that open resources are closed. A second
signal does so while a step is finished. The exit code is 128 plus the signal's number, as in a shell.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


_came: list[int] = []
"""Signals that came during this command."""


class EndedBySignalError(KeyboardInterrupt):
    """SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_code(number: int) -> int:
    """Return the exit code of a command that a signal ended."""
    return 128 + number


def exit_code_of(error: BaseException | None) -> int:
    """Return the exit code of a command that `error` ended: a KeyboardInterrupt, or an error with one as its cause."""
    return exit_code(_number_of(error))


def _number_of(error: BaseException | None) -> int:
    while error is not None:
        if isinstance(error, EndedBySignalError):
            return error.number
        error = error.__cause__
    return signal.SIGINT


def exit_code_if_ended() -> int:
    """Return the exit code of the last signal that came; 0 if none did."""
    return exit_code(_came[-1]) if _came else 0


@contextlib.contextmanager
def raising_on_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise :class:`EndedBySignalError`, as SIGINT raises KeyboardInterrupt."""
    # main() may run several times in one process, as in tests.
    _came.clear()
    # Python sets and runs handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that was ignored when mthp started stays ignored: nohup(1) sets SIGHUP to be ignored. SIGINT has Python's
    # own handler, which raises KeyboardInterrupt, or is ignored: a shell without job control starts background
    # processes with it ignored.
    numbers = [number for number in ENDING if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, _frame: FrameType | None) -> None:
        _came.append(number)
        raise EndedBySignalError(number)

    for number in numbers:
        signal.signal(number, end)
    reported, sys.unraisablehook = sys.unraisablehook, _send_again
    try:
        yield
    finally:
        sys.unraisablehook = reported
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


AGAIN_SECONDS = 0.02
"""Seconds after which a lost signal is sent again: a callback is over then, mostly."""


def _send_again(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again if Python ignored its exception, as in finalizers and callbacks; report other exceptions."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    number = _number_of(lost.exc_value)

    def send(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.raise_signal(number)

    # Raised at once, it would be ignored again.
    signal.signal(signal.SIGALRM, send)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


class Wish:
    """A callable that returns whether to stop.

    Attributes:
        number: the signal that came; 0 before the first.
    """

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> bool:
        return self.number != 0


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[Wish]:
    """Turn the first of the signals into a wish to stop. A second one acts as it did before."""
    wish = Wish()
    handlers = {number: signal.getsignal(number) for number in ENDING}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def note(number: int, _frame: FrameType | None) -> None:
        wish.number = number
        _came.append(number)
        # A second signal must end a command that does not come to the end of its step.
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
