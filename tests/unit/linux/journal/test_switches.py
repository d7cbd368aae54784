"""The journal of switches, on a directory that stands for sysfs: whatever happens, words are put back or left alone."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mthp.errors import MthpError, NotPermittedError, UnsupportedError, UsageError
from mthp.linux.interruptions import interruptions_held_back
from mthp.linux.journal.putback import Restored
from mthp.linux.journal.store import default_root
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.sysfs import ThpSysfs
from mthp.tunables import SIZE_WORDS
from strategies import examples

PAGE_KB = os.sysconf("SC_PAGESIZE") >> 10
ORDERS = (2, 3, 4, 5, 9)


class Machine:
    """A THP directory with switches that behave like the kernel's: they read back with brackets."""

    def __init__(self, root: Path) -> None:
        self.root = root / "thp"
        self.journal_root = root / "mthp"
        for order in ORDERS:
            (self.root / self.directory(order)).mkdir(parents=True)
            self.set(order, "inherit" if order == 9 else "never")
        self.set_top("madvise")

    def directory(self, order: int) -> str:
        return f"hugepages-{PAGE_KB << order}kB"

    def path(self, order: int) -> Path:
        return self.root / self.directory(order) / "enabled"

    def set(self, order: int, word: str) -> None:
        self.path(order).write_text(" ".join(f"[{each}]" if each == word else each for each in SIZE_WORDS) + "\n")

    def set_top(self, word: str) -> None:
        words = ("always", "madvise", "never")
        (self.root / "enabled").write_text(" ".join(f"[{each}]" if each == word else each for each in words))

    def word(self, order: int) -> str:
        text = self.path(order).read_text()
        return text[text.index("[") + 1 : text.index("]")]

    def words(self) -> dict[int, str]:
        return {order: self.word(order) for order in ORDERS}

    def journal(self, **options: float) -> SwitchJournal:
        return KernelLike(self, **options)

    @property
    def file(self) -> Path:
        return self.journal_root / "switches.journal"


class KernelLike(SwitchJournal):
    """A journal over switches that behave like the kernel's; a test can make it die at a write."""

    def __init__(self, machine: Machine, **options: float) -> None:
        super().__init__(machine.journal_root, ThpSysfs(machine.root), watched=False, **options)
        self.machine = machine
        self.die_at: int | None = None
        self.writes: list[tuple[str, str]] = []
        self.journaled: list[tuple[str, str, bytes]] = []

    def _write(self, switch: str, word: str) -> None:
        if self.die_at == len(self.writes):
            raise DiedError
        self.journaled.append((switch, word, self.machine.file.read_bytes()))
        super()._write(switch, word)
        self.writes.append((switch, word))
        for order in ORDERS:
            if switch.startswith(f"{self.machine.directory(order)}/"):
                self.machine.set(order, word)


class DiedError(BaseException):
    """Stands for the death of the process."""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def abandon(machine: Machine, *orders: int) -> None:
    """Have a process of its own open windows, one in the other, and die in them."""
    pid = os.fork()
    if pid == 0:
        journal = machine.journal()
        for order in orders:
            _WINDOWS.append(journal.only(order))
            _WINDOWS[-1].__enter__()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


_WINDOWS: list[AbstractContextManager[None]] = []


def test_a_window_leaves_one_size_on(machine: Machine) -> None:
    machine.set(3, "madvise")
    before = machine.words()
    with machine.journal().only(4):
        assert machine.words() == {2: "never", 3: "never", 4: "always", 5: "never", 9: "never"}
    assert machine.words() == before
    assert machine.file.read_bytes() == b""


def test_only_the_sizes_that_have_to_be_off_are_turned_off(machine: Machine) -> None:
    for order in (2, 3, 5):
        machine.set(order, "madvise")
    before = machine.words()
    with machine.journal().only(3, off=range(4, 9)):
        assert machine.words() == {2: "madvise", 3: "always", 4: "never", 5: "never", 9: "inherit"}
    assert machine.words() == before
    with machine.journal().only(4, off=()):
        assert machine.words() == before | {4: "always"}


def test_the_directory_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MTHP_RUN_DIR", str(tmp_path))
    assert default_root() == tmp_path


def test_a_switch_that_may_not_be_set_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with (
        pytest.raises(NotPermittedError, match="would have to be never") as caught,
        machine.journal().only(4),
    ):
        pass
    assert "echo never" in caught.value.help
    with (
        pytest.raises(NotPermittedError, match=f"{PAGE_KB << 4}kB/enabled is never"),
        machine.journal().only(4, off=()),
    ):
        pass
    assert not machine.journal_root.exists()
    machine.set(4, "always")
    machine.set(9, "never")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with machine.journal().only(4):
        # Nothing is to be set, so there is nothing to hold on to.
        assert not machine.journal_root.exists()


def test_inherit_of_never_is_off(machine: Machine) -> None:
    machine.set_top("never")
    journal = KernelLike(machine)
    with journal.only(4):
        assert machine.word(9) == "inherit"
    assert journal.writes == [("/".join(machine.path(4).parts[-2:]), word) for word in ("always", "never")]


def test_what_is_so_already_is_not_written(machine: Machine) -> None:
    machine.set(9, "never")
    machine.set(4, "always")
    journal = KernelLike(machine)
    with journal.only(4):
        pass
    assert journal.writes == []


def test_others_are_off_before_one_is_on_and_back_in_reverse(machine: Machine) -> None:
    journal = KernelLike(machine)
    with journal.only(4):
        pass
    switches = [switch for switch, _ in journal.writes]
    assert switches[-2:] == switches[1::-1]
    assert journal.writes[0][1] == "never"


def test_the_journal_is_written_before_the_switches(machine: Machine) -> None:
    journal = KernelLike(machine)
    with journal.only(4):
        written = list(journal.journaled)
    was = {}
    for switch, word, text in written:
        entries = [json.loads(line) for line in text.splitlines()]
        was[switch] = [entry["was"] for entry in entries if (entry["switch"], entry["ours"]) == (switch, word)]
    assert was == {f"{machine.directory(9)}/enabled": ["inherit"], f"{machine.directory(4)}/enabled": ["never"]}


def test_windows_nest(machine: Machine) -> None:
    before = machine.words()
    journal = machine.journal()
    with journal.only(4):
        outer = machine.words()
        with journal.only(5):
            assert machine.words() == {2: "never", 3: "never", 4: "never", 5: "always", 9: "never"}
        assert machine.words() == outer
    assert machine.words() == before


def test_put_back_after_an_exception(machine: Machine) -> None:
    before = machine.words()
    with pytest.raises(KeyboardInterrupt), machine.journal().only(4):
        raise KeyboardInterrupt
    assert machine.words() == before


def test_one_that_cannot_be_put_back_keeps_none_of_the_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.set(3, "always")
    machine.set(5, "always")
    before = machine.words()
    journal = machine.journal()
    write = SwitchJournal._write

    def failing(self: SwitchJournal, switch: str, word: str) -> None:
        if (switch, word) == (f"{machine.directory(5)}/enabled", "always"):
            raise MthpError("no such luck")
        write(self, switch, word)

    with pytest.raises(MthpError, match="no such luck"), journal.only(4):
        monkeypatch.setattr(SwitchJournal, "_write", failing)
    assert machine.words() == before | {5: "never"}
    monkeypatch.undo()
    assert [restored.switch for restored in machine.journal().restore_after_crash()] == [
        f"{machine.directory(5)}/enabled"
    ]
    assert machine.words() == before


def test_a_foreign_change_is_not_overruled(machine: Machine) -> None:
    with machine.journal().only(4):
        machine.set(4, "madvise")
        machine.set(2, "always")
    assert machine.words() == {2: "always", 3: "never", 4: "madvise", 5: "never", 9: "inherit"}


def test_after_a_crash(machine: Machine) -> None:
    before = machine.words()
    abandon(machine, 4)
    assert machine.words() != before
    restored = machine.journal().restore_after_crash()
    assert machine.words() == before
    names = {order: f"{machine.directory(order)}/enabled" for order in ORDERS}
    assert restored == [
        Restored(names[4], found="always", was="never", put_back=True),
        Restored(names[9], found="never", was="inherit", put_back=True),
    ]
    assert machine.journal().restore_after_crash() == []


def test_the_next_window_restores_first(machine: Machine) -> None:
    before = machine.words()
    abandon(machine, 4)
    with machine.journal().only(5):
        assert machine.words() == {2: "never", 3: "never", 4: "never", 5: "always", 9: "never"}
    assert machine.words() == before


def test_after_a_crash_a_foreign_change_is_reported_and_left(machine: Machine) -> None:
    abandon(machine, 4)
    machine.set(4, "inherit")
    restored = machine.journal().restore_after_crash()
    assert [(each.found, each.was, each.put_back) for each in restored] == [
        ("inherit", "never", False),
        ("never", "inherit", True),
    ]
    assert machine.word(4) == "inherit"


def test_after_a_crash_in_an_inner_window(machine: Machine) -> None:
    before = machine.words()
    abandon(machine, 4, 5)
    assert machine.word(5) == "always"
    machine.journal().restore_after_crash()
    assert machine.words() == before


@pytest.mark.parametrize("step", range(10))
def test_dying_at_every_write(machine: Machine, step: int) -> None:
    """Two windows, one in the other, make ten writes; whichever is not reached, the next run sets all right."""
    machine.set(3, "madvise")
    before = machine.words()
    journal = KernelLike(machine)
    journal.die_at = step
    with pytest.raises(DiedError), journal.only(4), journal.only(5):
        pass
    machine.journal().restore_after_crash()
    assert machine.words() == before


def test_a_switch_that_is_gone(machine: Machine) -> None:
    abandon(machine, 4)
    machine.path(4).unlink()
    restored = machine.journal().restore_after_crash()
    assert [(each.found, each.put_back) for each in restored] == [("", False), ("never", True)]


def test_entries_of_an_earlier_boot_mean_nothing(machine: Machine) -> None:
    abandon(machine, 4)
    lines = [json.loads(line) | {"boot": "another"} for line in machine.file.read_text().splitlines()]
    machine.file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    left = machine.words()
    assert machine.journal().restore_after_crash() == []
    assert machine.words() == left
    assert machine.file.read_bytes() == b""


@settings(suppress_health_check=list(HealthCheck), max_examples=examples(40))
@given(data=st.data())
def test_a_truncated_or_damaged_journal(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whole lines that were not touched are obeyed, whatever follows or surrounds them; nothing else is written."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    before = machine.words()
    abandon(machine, 4)
    left = machine.words()
    text = machine.file.read_bytes()
    cut = data.draw(st.integers(0, len(text)))
    machine.file.write_bytes(text[:cut] + data.draw(st.binary(max_size=20)))
    machine.journal().restore_after_crash()
    whole = text[:cut].count(b"\n")
    # The first line is of the order 9, the second of the order 4.
    expected = left | {order: before[order] for order in (9, 4)[:whole]}
    assert machine.words() in (expected, before)


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"switch": "../../../etc/passwd", "was": "always", "ours": "never", "boot": "B"}',
        b'{"switch": "hugepages-64kB/../enabled", "was": "always", "ours": "never", "boot": "B"}',
        b'{"switch": "hugepages-64kB/enabled\\n", "was": "always", "ours": "never", "boot": "B"}',
        b'{"switch": "hugepages-64kB/enabled", "was": "rm -rf", "ours": "never", "boot": "B"}',
        b'{"switch": 64, "was": "always", "ours": "never", "boot": "B"}',
        b'{"switch": "hugepages-64kB/enabled", "was": ["always"], "ours": "never", "boot": "B"}',
    ],
)
def test_a_forged_line_is_passed_over(machine: Machine, line: bytes) -> None:
    with machine.journal().only(4):
        pass
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    machine.file.write_bytes(line.replace(b'"B"', b'"' + boot + b'"') + b"\n")
    journal = KernelLike(machine)
    assert journal.restore_after_crash() == []
    assert journal.writes == []


def test_without_a_directory_there_is_nothing_to_do_and_none_is_made(machine: Machine) -> None:
    assert machine.journal().restore_after_crash() == []
    assert not machine.journal_root.exists()


def test_the_directory_is_private(machine: Machine) -> None:
    before = os.umask(0)
    try:
        with machine.journal().only(4):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(machine.journal_root.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in machine.journal_root.iterdir()} == {0o600}


def test_symbolic_links_are_not_followed(machine: Machine, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    machine.journal_root.symlink_to(elsewhere)
    with pytest.raises(NotPermittedError), machine.journal().only(4):
        pytest.fail("the window opened")
    machine.journal_root.unlink()
    machine.journal_root.mkdir(0o700)
    for name in ("switches.journal", "switches.lock"):
        (machine.journal_root / name).unlink(missing_ok=True)
        (machine.journal_root / name).symlink_to(victim)
        with pytest.raises(NotPermittedError), machine.journal().only(4):
            pytest.fail("the window opened")
        (machine.journal_root / name).unlink()
    assert victim.read_text() == "precious"
    assert list(elsewhere.iterdir()) == []
    assert machine.word(4) == "never"


def test_a_directory_that_others_may_write_in_is_not_used(machine: Machine) -> None:
    machine.journal_root.mkdir()
    machine.journal_root.chmod(0o777)
    with pytest.raises(NotPermittedError, match="others may write"), machine.journal().only(4):
        pytest.fail("the window opened")
    assert machine.word(4) == "never"


def test_a_full_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the entries fit. Nothing is changed, and nothing is left."""
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, text, offset: write(fd, text[: len(text) // 2], offset))
    before = machine.words()
    with pytest.raises(MthpError, match="cannot be written: No space left"), machine.journal().only(4):
        pytest.fail("the window opened")
    assert machine.words() == before
    assert machine.file.read_bytes() == b""


def test_something_else_in_the_place_of_the_journal(machine: Machine) -> None:
    machine.journal_root.mkdir(0o700)
    os.mkfifo(machine.file)
    with pytest.raises(NotPermittedError, match="not a regular file"), machine.journal().only(4):
        pytest.fail("the window opened")


def test_another_holds_the_lock(machine: Machine) -> None:
    with machine.journal().only(4):
        other = machine.journal(lock_timeout=0.02)
        left = machine.words()
        with pytest.raises(MthpError, match="another process"), other.only(5):
            pytest.fail("the window opened")
        with pytest.raises(MthpError, match="another process"):
            other.restore_after_crash()
        assert machine.words() == left
    with other.only(5):
        assert machine.word(5) == "always"


def test_threads_take_turns(machine: Machine) -> None:
    journal = machine.journal()
    before = machine.words()
    wrong = []

    def work(order: int) -> None:
        for _ in range(10):
            with journal.only(order):
                if [each for each, word in machine.words().items() if word != "never"] != [order]:
                    wrong.append(machine.words())

    threads = [threading.Thread(target=work, args=(order,)) for order in (2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert machine.words() == before


def test_no_descriptor_is_left(machine: Machine) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with machine.journal().only(4):
            pass
        machine.journal().restore_after_crash()
        with pytest.raises(UnsupportedError), machine.journal().only(7):
            pytest.fail("the window opened")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_size_without_a_switch(machine: Machine) -> None:
    with pytest.raises(UnsupportedError, match="order 7"), machine.journal().only(7):
        pytest.fail("the window opened")


def test_a_word_that_is_not_known(machine: Machine) -> None:
    machine.path(5).write_text("always [auto] never")
    with pytest.raises(UnsupportedError, match="auto"), machine.journal().only(4):
        pytest.fail("the window opened")
    assert machine.word(5) == "auto"


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_root() == Path("/run/mthp")
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_root() == tmp_path / "mthp"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match="runtime directory"):
        default_root()


def test_an_interruption_waits() -> None:
    """Also one that another thread of the process was given, which a blocked signal would not hold back."""
    steps: list[int] = []

    def interrupted() -> None:
        with interruptions_held_back():
            thread = threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT))
            thread.start()
            thread.join()
            for _ in range(1000):
                steps.append(len(steps))
        pytest.fail("it was lost")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(steps) == 1000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_other_threads_there_is_nothing_to_hold_back() -> None:
    done = []

    def work() -> None:
        with interruptions_held_back():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


def _numbers(machine: Machine) -> dict[str, str]:
    directory = machine.root / "khugepaged"
    directory.mkdir(exist_ok=True)
    for name, text in (("pages_to_scan", "4096\n"), ("scan_sleep_millisecs", "10000\n"), ("max_ptes_none", "511\n")):
        (directory / name).write_text(text)
    return {
        "khugepaged/max_ptes_none": "0",
        f"{machine.directory(4)}/enabled": "madvise",
        f"{machine.directory(9)}/enabled": "never",
        "khugepaged/scan_sleep_millisecs": "10",
    }


def _all(machine: Machine) -> dict[str, str]:
    return {str(file.relative_to(machine.root)): file.read_text().strip() for file in machine.root.rglob("*_*")}


def test_a_window_of_settings(machine: Machine) -> None:
    wanted = _numbers(machine)
    before, words = _all(machine), machine.words()
    journal = machine.journal()
    assert isinstance(journal, KernelLike)
    with journal.settings(wanted):
        assert (machine.word(4), machine.word(9)) == ("madvise", "never")
        assert _all(machine)["khugepaged/scan_sleep_millisecs"] == "10"
        assert _all(machine)["khugepaged/max_ptes_none"] == "0"
        assert [switch for switch, _ in journal.writes] == list(wanted)
    assert _all(machine) == before
    assert machine.words() == words


@pytest.mark.parametrize("writes", range(4))
def test_settings_are_put_back_after_a_death(machine: Machine, writes: int) -> None:
    wanted = _numbers(machine)
    before, words = _all(machine), machine.words()
    pid = os.fork()
    if pid == 0:
        journal = machine.journal()
        assert isinstance(journal, KernelLike)
        journal._put_back_to = lambda depth: os._exit(0)  # type: ignore[method-assign]
        journal.die_at = writes
        try:
            with journal.settings(wanted):
                os._exit(0)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    restored = machine.journal().restore_after_crash()
    assert len(restored) == writes
    assert _all(machine) == before
    assert machine.words() == words


@pytest.mark.parametrize(
    ("switch", "word", "error"),
    [
        ("khugepaged/pages_to_scan", "many", UsageError),
        ("khugepaged/defrag", "1", UnsupportedError),
        ("hugepages-64kB/enabled", "sometimes", UsageError),
        ("../../etc/passwd", "1", UnsupportedError),
    ],
)
def test_what_cannot_be_a_setting(machine: Machine, switch: str, word: str, error: type[Exception]) -> None:
    _numbers(machine)
    before = _all(machine)
    with pytest.raises(error), machine.journal().settings({switch: word}):
        pass
    assert _all(machine) == before
