"""A visit carries out exactly the folios of a plan, under every policy, in passes of any length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeSpace
from mthp.engine.khugepaged import Khugepaged
from mthp.engine.planning import plan_space
from mthp.engine.policy_lookup import policy_names
from mthp.engine.select import PlanOptions
from mthp.geometry import Geometry
from mthp.ptes import ORDER_NONE, Pte
from mthp.results import ScanResult
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma
from strategies import examples

SMALL = Geometry("16-ptes", 4096, 4)
SIZE = SMALL.pmd_size
STATES = (
    (0, ORDER_NONE),
    (int(Pte.PRESENT), 0),
    (int(Pte.PRESENT), 0),
    (int(Pte.PRESENT | Pte.ZERO), 0),
    (int(Pte.PRESENT), 2),
    (int(Pte.PRESENT | Pte.SHARED), 0),
    (int(Pte.SWAP), ORDER_NONE),
    (int(Pte.SWAP | Pte.GUARD), ORDER_NONE),
    (int(Pte.PRESENT | Pte.LAZYFREE), 0),
    (int(Pte.PRESENT | Pte.UFFD_WP), 0),
)


@st.composite
def spaces(draw: st.DrawFn) -> FakeSpace:
    """Return two mappings of a few PMD ranges each, in runs of a few states."""
    mappings = []
    for start in (SIZE, 20 * SIZE):
        ranges = draw(st.integers(1, 5))
        runs = draw(st.lists(st.tuples(st.sampled_from(STATES), st.sampled_from((1, 3, 4, 8, 16))), min_size=1))
        state = np.concatenate([np.full(count, bits, np.uint16) for (bits, _), count in runs])
        order = np.concatenate([np.full(count, folio, np.int8) for (_, folio), count in runs])
        flags = frozenset({"hg"} | draw(st.sampled_from((set(), set(), {"uw"}))))
        vma = Vma(start, start + ranges * SIZE, "rw-p", flags=flags, has_anon_vma=True)
        mappings.append((vma, np.resize(state, ranges * 16), np.resize(order, ranges * 16)))
    none, swap, shared = (draw(st.sampled_from((0, 1, 4, 8, 15))) for _ in range(3))
    enabled = draw(st.sets(st.integers(2, 4), min_size=1))
    return FakeSpace(
        mappings,
        geometry=SMALL,
        switches=Switches("madvise", dict.fromkeys(enabled, "madvise")),
        tunables=Tunables(none, swap, shared, draw(st.sampled_from((1, 16, 40, 1000)))),
        orders=range(2, 5),
    )


@pytest.mark.parametrize("policy", policy_names())
@given(space=spaces(), data=st.data())
@settings(max_examples=examples(60))
def test_the_first_round_is_the_plan(policy: str, space: FakeSpace, data: st.DataObject) -> None:
    plan = plan_space(space, PlanOptions(policy=policy, orders="enabled"))
    wanted = list(zip(plan.folios.address.tolist(), plan.folios.order.tolist(), strict=True))
    daemon = Khugepaged(policy=policy)
    assert daemon.enter(space) or not wanted
    rounds = 0
    while daemon.slots and daemon.full_scans == 0:
        daemon.do_scan()
        rounds += 1
        assert rounds < 1000
    # A batch is in the order of folio orders, and a pass that ends a round continues with the next, so it may have
    # wrapped.
    assert sorted(space.attempts[: len(wanted)]) == wanted
    filled = sum(daemon.statistics.filled.values())
    if len(space.attempts) == len(wanted):
        assert filled * 4096 == plan.filled_bytes
        assert daemon.statistics.results[ScanResult.SUCCEED] == len({address // SIZE for address, _ in wanted})


@pytest.mark.parametrize("policy", ["mainline", "no-creep"])
@given(space=spaces())
@settings(max_examples=examples(60))
def test_policies_that_do_not_creep_are_done_after_one_round(policy: str, space: FakeSpace) -> None:
    daemon = Khugepaged(policy=policy)
    if not daemon.enter(space):
        return
    space._tunables = Tunables(space.tunables.max_ptes_none, 0, 0, 10_000)
    daemon.do_scan()
    done = list(space.attempts)
    for _ in range(3):
        daemon.do_scan()
    assert space.attempts == done
