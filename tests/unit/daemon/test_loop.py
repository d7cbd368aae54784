"""The loop of the daemon's main thread: timers that replace each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mthp.daemon.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def test_a_timer_that_an_action_of_the_same_round_replaces_does_not_run_its_old_action(loop: Loop) -> None:
    done: list[str] = []

    def replace() -> None:
        done.append("first")
        loop.after("second", 0, lambda: done.append("new"))

    loop.after("first", 0, replace)
    loop.after("second", 0, lambda: done.append("old"))
    loop.once()
    assert done == ["first"]
    loop.once()
    assert done == ["first", "new"]


def test_a_timer_that_starts_itself_again_runs_once_a_round(loop: Loop) -> None:
    done: list[int] = []
    loop.every("tick", 0, lambda: done.append(len(done)))
    loop.once()
    assert done == [0]
    loop.once()
    assert done == [0, 1]
