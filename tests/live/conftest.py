"""What live tests share: targets, the switches that most of them want, and the observer of the mover's steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mover_targets import BLOCK_SIZE, Observe
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.mover import steps
from targets import Puppet
from thp_switches import ThpSwitches


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    """A process that maps, touches and advises memory on command."""
    with Puppet() as puppet:
        yield puppet


@pytest.fixture
def space(puppet: Puppet) -> Iterator[LiveAddressSpace]:
    """The address space of the puppet."""
    with open_live(puppet.pid) as space:
        yield space


@pytest.fixture
def no_sizes(thp_switches: ThpSwitches) -> None:
    """Switch every size off: a fault brings one page, and the kernel's khugepaged makes nothing."""
    thp_switches.only()


@pytest.fixture
def only_blocks(thp_switches: ThpSwitches) -> None:
    """Have a fault bring a folio of the order that tests move, and no other."""
    thp_switches.only(BLOCK_SIZE, word="always")


@pytest.fixture
def observe() -> Iterator[Observe]:
    """Have an observer called after every step of the mover, until the test ends."""
    yield steps.observe
    steps.observe(None)
