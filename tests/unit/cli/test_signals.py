"""Signals while Python ignores exceptions."""

from __future__ import annotations

import signal
import time
import weakref

import pytest

from mthp.cli.signals import EndedBySignalError, raising_on_signals
from waiting import PATIENCE


class Thing:
    """An object with weak references."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_in_a_callback_of_a_weak_reference_is_not_lost(
    number: signal.Signals, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in _get_module_lock() of importlib: one that came then left a simulation running."""

    def work() -> None:
        for _ in range(times):
            thing = Thing()
            reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
            del thing
            assert reference() is None
        time.sleep(PATIENCE)

    with raising_on_signals(), pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert isinstance(caught.value, EndedBySignalError) == (number != signal.SIGINT)
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_other_ignored_exceptions_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    thing = Thing()
    with raising_on_signals():
        reference = weakref.ref(thing, lambda _: int("none"))
        del thing
    assert reference() is None
    assert "ValueError" in capsys.readouterr().err
