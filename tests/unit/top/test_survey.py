"""Which processes are read, how often and at what cost, with readings and a clock of the test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import FakeClock, FakeSpace
from mthp.addrspace import AddressSpace
from mthp.engine.census import take_census
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.errors import MthpError, TargetVanishedError
from mthp.pacing import CPU_SLICE
from mthp.top.looks import NotWantedError, first_look, mappings, second_look
from mthp.top.mapped import Mapped
from mthp.top.model import Row
from mthp.top.survey import BURST, FRESH, LARGEST, ROUND, Survey
from report_spaces import mixed, redis_like
from waiting import until


class Host:
    """Processes that do not exist, and a clock that the test turns."""

    def __init__(self, count: int) -> None:
        self.rows = {pid: Row(pid, f"p{pid}", pid * 4096, pid * 4096) for pid in range(1, count + 1)}
        self.looked: Counter[tuple[str, int]] = Counter()
        self.refused: set[int] = set()
        self.now = 0.0

    def first(self) -> Iterable[Row]:
        self.looked["first", 0] += 1
        return list(self.rows.values())

    def second(self, row: Row) -> Row:
        self.looked["second", row.key] += 1
        if row.key not in self.rows:
            raise TargetVanishedError("gone")
        return replace(row, huge=0, gain=row.anonymous)

    def third(self, row: Row, _options: PlanOptions, _stop: Callable[[], bool]) -> Row:
        self.looked["third", row.key] += 1
        if row.key in self.refused:
            raise MthpError("broken")
        return replace(row, huge=0, gain=1, bloat=2, planned=True)

    def survey(self) -> Survey:
        return Survey(PlanOptions(), first=self.first, second=self.second, third=self.third, clock=lambda: self.now)


def work_off(survey: Survey, limit: int = 10_000) -> int:
    pieces = 0
    while survey.work():
        pieces += 1
        assert pieces < limit
    return pieces


def test_of_thousands_only_the_largest_and_the_visible_are_looked_at_closely() -> None:
    host = Host(5000)
    survey = host.survey()
    survey.list_all()
    survey.show([7, 8, 9])
    work_off(survey)
    assert len(survey.rows()) == 5000
    second = {key for look, key in host.looked if look == "second"}
    assert second == {7, 8, 9} | set(range(5000 - LARGEST + 1, 5001))
    assert {key for look, key in host.looked if look == "third"} == {7, 8, 9}
    rows = {row.key: row for row in survey.rows()}
    assert (rows[8].planned, rows[8].bloat) == (True, 2)
    assert (rows[5000].planned, rows[5000].gain) == (False, 5000 * 4096)
    assert rows[1].gain is None


def test_looks_grow_old_and_are_taken_again() -> None:
    host = Host(3)
    survey = host.survey()
    survey.list_all()
    survey.show([2])
    work_off(survey)
    assert not survey.work()
    host.now += FRESH + 1
    work_off(survey)
    assert host.looked["third", 2] == 2
    assert host.looked["first", 0] == 2
    survey.refresh(2)
    work_off(survey)
    assert host.looked["third", 2] == 3


def test_who_is_gone_is_forgotten_and_a_new_program_is_looked_at_anew() -> None:
    host = Host(3)
    survey = host.survey()
    survey.list_all()
    survey.show([1, 2, 3])
    work_off(survey)
    del host.rows[1]
    host.rows[2] = Row(2, "another program", 4096, 4096)
    host.now += ROUND + 0.1
    survey.work()
    rows = {row.key: row for row in survey.rows()}
    assert rows.keys() == {2, 3}
    assert (rows[2].name, rows[2].planned, rows[3].planned) == ("another program", False, True)


def test_who_goes_while_being_looked_at_is_forgotten() -> None:
    host = Host(2)
    survey = host.survey()
    survey.list_all()
    del host.rows[1]
    work_off(survey)
    assert [row.key for row in survey.rows()] == [2]


def test_trouble_is_told_and_not_tried_all_the_time() -> None:
    host = Host(2)
    host.refused = {2}
    survey = host.survey()
    survey.list_all()
    survey.show([1, 2])
    work_off(survey)
    rows = {row.key: row for row in survey.rows()}
    assert rows[2].trouble == "broken"
    assert host.looked["third", 2] == 1
    assert rows[1].planned


@pytest.mark.parametrize("look", [0.0001, 0.03])
def test_it_keeps_to_its_share_and_rests_seldom(look: float) -> None:
    share, wake, host, clock, spent = 0.1, 0.0002, Host(50), FakeClock(), FakeClock()
    looks: list[float] = []
    rests: list[float] = []

    def use(seconds: float) -> None:
        clock.now += seconds
        spent.now += seconds

    def second(row: Row) -> Row:
        use(look)
        looks.append(look)
        return replace(row, huge=0, gain=0)

    class Closing:
        def is_set(self) -> bool:
            return clock.now - begun > 60

        def wait(self, seconds: float) -> None:
            clock.now += seconds
            use(wake)
            rests.append(seconds)

    survey = Survey(PlanOptions(), share, first=host.first, second=second, third=host.third, clock=clock, spent=spent)
    survey._next_second = lambda: survey._known[1]  # type: ignore[method-assign]
    survey._closing = Closing()  # type: ignore[assignment]
    begun = clock.now
    survey.list_all()
    survey._run()
    earned = BURST + share * (clock.now - begun)
    assert spent.now - 1000 <= earned + look + wake
    assert sum(looks) >= 0.9 * earned
    assert len(rests) <= 1 + earned / CPU_SLICE


def test_listing_thousands_leaves_time_for_looking_closely() -> None:
    host, used = Host(50), [0.0]

    def first() -> Iterable[Row]:
        used[0] += 0.2
        return host.first()

    survey = Survey(
        PlanOptions(),
        0.1,
        first=first,
        second=host.second,
        third=host.third,
        clock=lambda: host.now,
        spent=lambda: used[0],
    )
    survey.list_all()
    work_off(survey)
    host.now = 7.9
    assert not survey.work()
    # 0.2 s are a quarter of a tenth of a processor in 8 s.
    host.now = 8.1
    survey.work()
    assert host.looked["first", 0] == 2


def fake_process(proc: Path, pid: int, *, statm: str, comm: str = "x\n", rollup: str | None = None) -> None:
    directory = proc / str(pid)
    directory.mkdir()
    (directory / "statm").write_text(statm)
    (directory / "comm").write_text(comm)
    if rollup is not None:
        (directory / "smaps_rollup").write_text(rollup)


ROLLUP = """00400000-7fff0000 ---p 00000000 00:00 0    [rollup]
Rss:               10240 kB
Anonymous:          8192 kB
AnonHugePages:      2048 kB
"""


def test_the_cheap_looks_read_what_the_kernel_wrote(tmp_path: Path) -> None:
    fake_process(tmp_path, 10, statm="5000 2000 500 10 0 100 0\n", comm="redis-server\n", rollup=ROLLUP)
    fake_process(tmp_path, 11, statm="0 0 0 0 0 0 0\n", comm="kworker/0:1\n")
    fake_process(tmp_path, 12, statm="")
    (tmp_path / "13").mkdir()
    (tmp_path / "self").mkdir()
    (row,) = first_look(str(tmp_path))
    assert row == Row(10, "redis-server", 2000 * 4096, 1500 * 4096)
    looked = second_look(row, str(tmp_path))
    assert (looked.resident, looked.anonymous, looked.huge, looked.gain) == (10 << 20, 8 << 20, 2 << 20, 6 << 20)
    assert looked.huge_share == 0.25
    with pytest.raises(TargetVanishedError):
        second_look(Row(99, "x", 1, 1), str(tmp_path))


@pytest.mark.slow
def test_mappings_share_the_plan_among_them() -> None:
    space, options = redis_like(), PlanOptions(max_ptes_none=64)
    rows = mappings(space, options)
    plan, census = plan_space(space, options), take_census(space)
    assert [row.key for row in rows] == [vma.start for vma in space.vmas()]
    assert sum(row.gain or 0 for row in rows) == plan.copied_bytes > 0
    assert sum(row.bloat or 0 for row in rows) == plan.filled_bytes > 0
    folios = Counter[int]()
    for row in rows:
        folios.update(row.folios)
    assert dict(folios) == plan.folios_by_order
    assert sum(row.resident for row in rows) == census.total.resident * 4096
    assert all(sum((row.by_order or {}).values()) == row.resident for row in rows)


def test_a_look_that_nobody_waits_for_ends() -> None:
    with pytest.raises(NotWantedError):
        mappings(redis_like(), PlanOptions(), lambda: True)


def test_a_recording_is_shown_at_the_step_that_is_chosen() -> None:
    spaces = [FakeSpace([mixed(1 << 32, ranges, 0.8)], label=f"step {ranges}") for ranges in (1, 2, 3)]

    def opened(step: int | None) -> AddressSpace:
        assert step is not None
        return spaces[step]

    mapped = Mapped(opened, PlanOptions(), steps=(0.0, 1.0, 2.5))
    mapped.start()
    try:
        assert mapped.label == "step 1"
        mapped.go(99)
        until(lambda: mapped.arrived, "the step")
        assert (mapped.step, mapped.label) == (2, "step 3")
        (row,) = mapped.rows()
        assert mapped.range_of(row.key) == (1 << 32, (1 << 32) + (3 << 21))
        assert mapped.range_of(5) == (5, 5)
    finally:
        mapped.close()


def test_what_is_known_stays_when_a_target_exits() -> None:
    space = redis_like()
    mapped = Mapped(lambda _: space, PlanOptions(), live=True)
    mapped.look()
    assert len(mapped.rows()) == 3
    space.vanished = True
    mapped.look()
    assert "exited" in mapped.trouble
    assert len(mapped.rows()) == 3
