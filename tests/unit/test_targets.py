"""Names of targets."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.errors import TargetVanishedError, UsageError
from mthp.ptes import Pte
from mthp.targets import PID_MAX, find, find_targets, open_target, pid_of, refuse_ancestor, resolve
from mthp.vma import Vma


@pytest.mark.parametrize(
    ("target", "pid"),
    [
        (1, 1),
        (np.int64(1), 1),
        ("1", 1),
        ("4194304", PID_MAX),
        (PID_MAX, PID_MAX),
        ("self", os.getpid()),
        (os.getpid(), os.getpid()),
    ],
    ids=["one", "NumPy", "text", "largest", "largest number", "self", "this process"],
)
def test_numbers_are_pids(target: int | str, pid: int) -> None:
    assert pid_of(target) == pid


@pytest.mark.parametrize(
    "target", ["redis.parquet", "./123", "", "-", "--5", "1-2", "1_000", "+7", " 12", "12\n", "१२", "0x10", Path("12")]
)
def test_everything_else_is_a_file(target: str | os.PathLike[str]) -> None:
    assert pid_of(target) is None


@pytest.mark.parametrize("target", [0, "0", -1, "-1", PID_MAX + 1, "99999999", 1 << 70, "9" * 5000, "-" + "9" * 5000])
def test_numbers_that_no_process_has(target: int | str) -> None:
    with pytest.raises(TargetVanishedError, match="no process"):
        pid_of(target)


@pytest.mark.parametrize("target", ["no-such-file", "a" * 300, "a/" * 3000, "nul\0byte", "--5", Path("no-such-file")])
def test_a_file_that_is_not_there(target: str | os.PathLike[str]) -> None:
    with pytest.raises(UsageError, match="neither a PID nor 'self' nor a file") as caught:
        open_target(target)
    assert "mthp snapshot" in caught.value.help


@pytest.mark.parametrize("target", [None, 3.5, True, ["1"], np.ones(4)], ids=["none", "float", "bool", "list", "array"])
def test_what_cannot_be_a_target_is_refused_by_its_type(target: Any) -> None:
    with pytest.raises(UsageError, match=f"not of type {type(target).__name__}") as caught:
        open_target(target)
    assert "collapse_buffer" in caught.value.help


def test_a_snapshot_by_its_path(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from mthp.snapshot import record

    space = FakeSpace([(Vma(1 << 40, (1 << 40) + 8192, "rw-p"), *page_runs((2, Pte.PRESENT, 0)))], label="7 (a)")
    path = tmp_path / "7"
    record(space, path)
    for target in (path, str(path)):
        with open_target(target) as opened:
            assert opened.label == "7 (a)"


def test_this_process() -> None:
    for target in ("self", os.getpid(), str(os.getpid())):
        with open_target(target) as space:
            assert space.label.startswith(f"{os.getpid()} (")


def test_the_parent_and_the_first_process_are_ancestors() -> None:
    pid = os.getpid()
    while (parent := int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])) > 0:
        pid = parent
    if pid == os.getpid():
        pytest.skip("nothing started this process")
    for ancestor in (os.getppid(), str(os.getppid()), pid):
        with pytest.raises(UsageError, match=f"process {ancestor} is an ancestor") as caught:
            refuse_ancestor(ancestor)
        assert "from elsewhere" in caught.value.help


@pytest.mark.parametrize(
    "target", ["self", os.getpid(), "some.parquet", Path("some.parquet")], ids=["self", "pid", "file", "path"]
)
def test_what_is_no_ancestor_is_not_refused(target: int | str | os.PathLike[str]) -> None:
    refuse_ancestor(target)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake /proc with two processes of redis, a kernel thread, this process and its child."""
    proc = tmp_path / "proc"
    for pid, comm, flags, parent in (
        (7, "redis-server", 0, 1),
        (8, "redis-server", 0, 1),
        (9, "kswapd0", 0x200000, 2),
        (os.getpid(), "python", 0, 1),
        (10, "java", 0, 1),
    ):
        directory = proc / str(pid)
        directory.mkdir(parents=True)
        fields = ["S", str(parent), *["1"] * 4, str(flags), *["0"] * 12, "4711", *["0"] * 20]
        (directory / "stat").write_text(f"{pid} ({comm}) {' '.join(fields)}\n")
        (directory / "status").write_text("Uid:\t0\t0\t0\t0\n")
        (directory / "cgroup").write_text("0::/system.slice/redis.service\n" if comm == "redis-server" else "0::/\n")
    # Not an argument: it would have to pass through resolve, find, find_targets and the finder, for these tests alone.
    monkeypatch.setattr("mthp.linux.facts.PROC", str(proc))
    monkeypatch.chdir(tmp_path)
    return proc


def test_several_targets_are_found_once_each_in_order(machine: Path) -> None:
    found = find_targets(["10", "unit:redis", "comm:redis*", "java", "comm:none"])
    assert [each.target for each in found.found] == [10, 7, 8]
    assert [each.service for each in found.found] == ["", "unit:redis.service", "unit:redis.service"]
    assert [word for word, _ in found.missing] == ["comm:none"]
    assert not found.single


def test_all_leaves_out_this_process_and_kernel_threads(machine: Path) -> None:
    assert [each.target for each in find("all")] == [7, 8, 10]


def test_one_target_is_single_if_it_was_named_itself(machine: Path) -> None:
    assert find_targets([10]).single
    assert not find_targets(["java"]).single


def test_a_bare_word_is_the_name_of_a_process_or_the_error_says_what_to_write(machine: Path) -> None:
    assert [each.target for each in find("redis-server")] == [7, 8]
    with pytest.raises(UsageError) as caught:
        find("redis-sever")
    assert "did you mean comm:redis-server?" in caught.value.help
    assert "unit:NAME" in caught.value.help
    with pytest.raises(UsageError, match="neither a PID nor 'self' nor a file") as caught:
        find("namespace:x")
    assert "unknown kind of name 'namespace'" in caught.value.help


def test_a_file_goes_before_a_process_of_that_name(machine: Path, tmp_path: Path) -> None:
    (tmp_path / "java").write_text("")
    assert find("java")[0].facts is None
    assert find("comm:java")[0].facts is not None


def test_a_name_that_must_be_one_process(machine: Path) -> None:
    assert resolve("java") == 10
    with pytest.raises(UsageError, match=r"2 processes fit 'unit:redis': 7 \(redis-server\), 8"):
        resolve("unit:redis")
    with pytest.raises(TargetVanishedError, match="no process fits"):
        resolve("pod:shop/*")


def test_a_pid_that_another_process_has_now_is_not_the_target(machine: Path) -> None:
    with pytest.raises(TargetVanishedError, match="is gone"):
        # The fake process has a start time that this one does not have.
        replace(find("java")[0], target=os.getpid()).open()


def test_a_hint_is_a_name_that_can_be_written_as_it_is(machine: Path) -> None:
    for pid, comm in ((7, "[x]"), (8, "")):
        stat = machine / str(pid) / "stat"
        stat.write_text(stat.read_text().replace("redis-server", comm))
    with pytest.raises(TargetVanishedError) as missing:
        find("comm:[x]")
    assert "did you mean comm:[[]x]?" in missing.value.help
    assert [each.target for each in find("comm:[[]x]")] == [7]
    with pytest.raises(UsageError) as unknown:
        find("")
    assert "did you mean" not in unknown.value.help


def test_a_hint_is_of_the_kind_that_was_written_if_one_is_close(machine: Path) -> None:
    for word, hint in (
        ("unit:redi", "unit:redis?"),
        ("unit:redi.service", "unit:redis.service?"),
        ("cgroup:/system.slice/redi.service", "cgroup:/system.slice/redis.service?"),
    ):
        with pytest.raises(TargetVanishedError) as caught:
            find(word)
        assert f"did you mean {hint}" in caught.value.help
    with pytest.raises(TargetVanishedError) as caught:
        find("unit:javaa")
    assert "did you mean comm:java?" in caught.value.help
