"""What live tests share: the observer of the mover's steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mover_targets import Observe
from mthp.linux.mover import steps


@pytest.fixture
def observe() -> Iterator[Observe]:
    """Have an observer called after every step of the mover, until the test ends."""
    yield steps.observe
    steps.observe(None)
